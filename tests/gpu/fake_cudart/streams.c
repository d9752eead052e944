/* Streams are threads that take what was queued in its order, late if ``delay_us`` says so; events. */
#define _GNU_SOURCE
#include "fake.h"
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { COPY, FILL, CALL, RECORD, WAIT_EVENT, WAIT_VALUE, WRITE_VALUE };

struct op {
    int what;
    struct piece *pieces;
    size_t count;
    bool any_order;
    int value;
    unsigned flags;
    uint64_t word, generation;
    void (*function)(void *);
    void *argument;
    struct event *event;
    struct op *next;
};

struct stream {
    uint64_t magic;
    struct op *first, *last, *running;
    bool ending;
    unsigned random;
    struct stream *next;
};

struct event {
    uint64_t magic;
    uint64_t recorded, done; /* generations */
    int64_t ns;
    int users; /* operations that name it */
    bool destroyed;
};

#define STREAM 0x57EA4ULL
#define EVENT 0xE7E47ULL

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static struct stream *streams, *plain; /* plain: stream 0 */
static int stream_count, event_count;

void fake_stream_counts(int *some_streams, int *some_events)
{
    pthread_mutex_lock(&lock);
    *some_streams = stream_count;
    *some_events = event_count;
    pthread_mutex_unlock(&lock);
}

static int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

/* --- what a stream does */

static void move(struct stream *stream, const struct op *op)
{
    size_t first = op->any_order && op->count > 1 ? rand_r(&stream->random) % op->count : 0;
    for (size_t i = 0; i < op->count; i++) {
        const struct piece *p = &op->pieces[(first + i) % op->count];
        if (!fake_may_touch(p->target, p->size) || (p->source && !fake_may_touch(p->source, p->size))) {
            fake_lose(700);
            return;
        }
        if (!p->source) {
            memset((void *)p->target, op->value, p->size);
        } else if (fake_settings.delay_us && p->size > 1) { /* seen half done by whoever looks too early */
            memmove((void *)p->target, (void *)p->source, p->size / 2);
            usleep(rand_r(&stream->random) % (fake_settings.delay_us + 1));
            memmove((char *)p->target + p->size / 2, (char *)p->source + p->size / 2, p->size - p->size / 2);
        } else {
            memmove((void *)p->target, (void *)p->source, p->size);
        }
    }
}

static bool holds(uint64_t found, uint64_t wanted, unsigned flags)
{
    switch (flags) {
    case 0: return (int64_t)(found - wanted) >= 0;
    case 1: return found == wanted;
    case 2: return (found & wanted) != 0;
    default: return ~(found | wanted) != 0;
    }
}

static void touch_value(const struct op *op)
{
    uint64_t *at = (uint64_t *)op->pieces->target;
    if (op->what == WRITE_VALUE) {
        __atomic_store_n(at, op->word, __ATOMIC_RELEASE);
        return;
    }
    while (!holds(__atomic_load_n(at, __ATOMIC_ACQUIRE), op->word, op->flags) && !fake_sticky()) usleep(50);
}

static void run(struct stream *stream, struct op *op)
{
    if (fake_settings.delay_us) usleep(rand_r(&stream->random) % (fake_settings.delay_us + 1));
    int fault = op->what == RECORD ? 0 : fake_enter("async");
    if (fault) fake_lose(fault);
    if (op->what == WAIT_EVENT) {
        pthread_mutex_lock(&lock);
        while (op->event->done < op->generation) pthread_cond_wait(&changed, &lock);
        pthread_mutex_unlock(&lock);
    }
    if (fake_sticky() || op->what == RECORD || op->what == WAIT_EVENT) return;
    if (op->what == COPY || op->what == FILL) move(stream, op);
    else if (op->what == CALL) op->function(op->argument);
    else touch_value(op);
}

static void release_event(struct event *event) /* with the lock */
{
    if (--event->users == 0 && event->destroyed) free(event);
}

static void *work(void *argument)
{
    struct stream *stream = argument;
    pthread_mutex_lock(&lock);
    for (;;) {
        struct op *op = stream->first;
        if (!op) {
            if (stream->ending) break;
            pthread_cond_wait(&changed, &lock);
            continue;
        }
        stream->running = op;
        pthread_mutex_unlock(&lock);
        run(stream, op);
        pthread_mutex_lock(&lock);
        stream->first = op->next;
        if (!stream->first) stream->last = NULL;
        stream->running = NULL;
        if (op->what == RECORD && op->event->done < op->generation) {
            op->event->done = op->generation;
            op->event->ns = now_ns();
        }
        if (op->event) release_event(op->event);
        free(op->pieces);
        free(op);
        pthread_cond_broadcast(&changed);
    }
    for (struct stream **at = &streams; *at; at = &(*at)->next)
        if (*at == stream) {
            *at = stream->next;
            break;
        }
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
    stream->magic = 0;
    free(stream);
    return NULL;
}

/* --- streams */

static int start(struct stream **found)
{
    pthread_t thread;
    struct stream *made = calloc(1, sizeof *made);
    made->magic = STREAM;
    made->random = (unsigned)(fake_settings.seed + ++stream_count);
    made->next = streams;
    streams = made;
    if (pthread_create(&thread, NULL, work, made)) return 2;
    pthread_detach(thread);
    *found = made;
    return 0;
}

int fake_stream(struct stream **found)
{
    pthread_mutex_lock(&lock);
    int code = start(found);
    pthread_mutex_unlock(&lock);
    return code;
}

static struct stream *known(struct stream *stream) /* with the lock; NULL: no such stream */
{
    if (!stream) {
        if (!plain && !start(&plain)) stream_count--; /* nobody gives it back */
        return plain;
    }
    for (struct stream *s = streams; s; s = s->next)
        if (s == stream) return s->ending ? NULL : s;
    return NULL;
}

int fake_stream_destroy(struct stream *stream)
{
    pthread_mutex_lock(&lock);
    stream = stream ? known(stream) : NULL;
    if (stream) {
        stream->ending = true;
        stream_count--;
        pthread_cond_broadcast(&changed);
    }
    pthread_mutex_unlock(&lock);
    return stream ? 0 : 400;
}

int fake_stream_wait(struct stream *stream)
{
    pthread_mutex_lock(&lock);
    stream = known(stream);
    while (stream && stream->first) pthread_cond_wait(&changed, &lock);
    pthread_mutex_unlock(&lock);
    return stream ? fake_sticky() : 400;
}

int fake_stream_query(struct stream *stream)
{
    pthread_mutex_lock(&lock);
    stream = known(stream);
    int code = !stream ? 400 : stream->first ? 600 : 0;
    pthread_mutex_unlock(&lock);
    return code;
}

void fake_drain(void)
{
    pthread_mutex_lock(&lock);
    for (;;) {
        struct stream *busy = streams;
        while (busy && !busy->first) busy = busy->next;
        if (!busy) break;
        pthread_cond_wait(&changed, &lock);
    }
    pthread_mutex_unlock(&lock);
}

void fake_stream_sweep(void) /* events that nobody names any more are the process's to lose */
{
    pthread_mutex_lock(&lock);
    for (struct stream *s = streams; s; s = s->next) s->ending |= s != plain;
    stream_count = event_count = 0;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

bool fake_in_use(uintptr_t start_, size_t size)
{
    bool used = false;
    pthread_mutex_lock(&lock);
    for (struct stream *s = streams; s; s = s->next)
        for (struct op *op = s->first; op; op = op->next)
            for (size_t i = 0; op->what <= FILL && i < op->count; i++) {
                const struct piece *p = &op->pieces[i];
                used |= p->target < start_ + size && start_ < p->target + p->size;
                used |= p->source && p->source < start_ + size && start_ < p->source + p->size;
            }
    pthread_mutex_unlock(&lock);
    return used;
}

static int queue(struct stream *stream, struct op op, const struct piece *pieces)
{
    struct op *made = malloc(sizeof *made);
    *made = op;
    if (op.count) {
        made->pieces = malloc(op.count * sizeof *pieces);
        memcpy(made->pieces, pieces, op.count * sizeof *pieces);
    }
    pthread_mutex_lock(&lock);
    stream = known(stream);
    if (!stream) {
        pthread_mutex_unlock(&lock);
        free(made->pieces);
        free(made);
        return 400;
    }
    if (made->event) {
        made->event->users++;
        made->generation = op.what == RECORD ? ++made->event->recorded : made->event->recorded;
    }
    if (stream->last) stream->last->next = made;
    else stream->first = made;
    stream->last = made;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
    return 0;
}

int fake_copy(struct stream *stream, const struct piece *pieces, size_t count, bool any_order)
{
    return queue(stream, (struct op){.what = COPY, .count = count, .any_order = any_order}, pieces);
}

int fake_fill(struct stream *stream, uintptr_t address, int value, size_t size)
{
    struct piece piece = {address, 0, size};
    return queue(stream, (struct op){.what = FILL, .count = 1, .value = value}, &piece);
}

int fake_call(struct stream *stream, void (*function)(void *), void *argument)
{
    return queue(stream, (struct op){.what = CALL, .function = function, .argument = argument}, NULL);
}

int fake_value(struct stream *stream, uintptr_t address, uint64_t value, unsigned flags, bool write)
{
    struct piece piece = {address, 0, 8};
    if (address % 8 || flags > (write ? 1 : 3) || !fake_may_touch(address, 8)) return 1;
    struct op op = {.what = write ? WRITE_VALUE : WAIT_VALUE, .count = 1, .flags = flags, .word = value};
    return queue(stream, op, &piece);
}

/* --- events */

int fake_event(struct event **found)
{
    struct event *made = calloc(1, sizeof *made);
    made->magic = EVENT;
    pthread_mutex_lock(&lock);
    event_count++;
    pthread_mutex_unlock(&lock);
    *found = made;
    return 0;
}

int fake_event_destroy(struct event *event)
{
    if (!event || event->magic != EVENT || event->destroyed) return 400;
    pthread_mutex_lock(&lock);
    event_count--;
    event->destroyed = true;
    event->users++;
    release_event(event);
    pthread_mutex_unlock(&lock);
    return 0;
}

int fake_event_record(struct event *event, struct stream *stream)
{
    if (!event || event->magic != EVENT) return 400;
    return queue(stream, (struct op){.what = RECORD, .event = event}, NULL);
}

int fake_stream_wait_event(struct stream *stream, struct event *event)
{
    if (!event || event->magic != EVENT) return 400;
    return queue(stream, (struct op){.what = WAIT_EVENT, .event = event}, NULL);
}

int fake_event_query(struct event *event)
{
    if (!event || event->magic != EVENT) return 400;
    pthread_mutex_lock(&lock);
    int code = event->done < event->recorded ? 600 : 0;
    pthread_mutex_unlock(&lock);
    return fake_sticky() ? fake_sticky() : code;
}

int fake_event_wait(struct event *event)
{
    if (!event || event->magic != EVENT) return 400;
    pthread_mutex_lock(&lock);
    while (event->done < event->recorded) pthread_cond_wait(&changed, &lock);
    pthread_mutex_unlock(&lock);
    return fake_sticky();
}

int fake_event_elapsed(struct event *first, struct event *second, float *ms)
{
    if (!first || !second || !first->recorded || !second->recorded) return 400;
    pthread_mutex_lock(&lock);
    int code = first->done < first->recorded || second->done < second->recorded ? 600 : 0;
    *ms = (float)(second->ns - first->ns) / 1e6f;
    pthread_mutex_unlock(&lock);
    return code;
}
