"""The gRPC edge: the server and the client, what they share, and the generated messages."""
