"""What the server and the client of one wire share: status codes and the descriptor socket's packets."""
