/* Many WebSocket listeners of /1.0/events in one process: prints when events arrive, and whether all arrive in order.
 *
 *   listen SOCKET STREAMS
 *
 * Prints {"open": STREAMS} when all streams are open. For each event, when all streams have it, prints its number, the
 * "value" in its metadata, and the times (CLOCK_MONOTONIC, in seconds) at which the first and the last stream had it:
 * {"event": 1, "value": 17, "first": 1.5, "last": 1.6, "disorder": 0}; "disorder" counts the values, in all streams,
 * that were not their predecessor plus one. Ends when its standard input ends.
 */

#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { BUFFER = 4096, EVENTS = 1 << 16, AT_ONCE = 128, PING = 0x9, TEXT = 0x1 };

static const char REQUEST[] =
	"GET /1.0/events HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
	"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n";

struct stream {
	int socket, open, events;
	long value;
	size_t filled;
	unsigned char buffer[BUFFER + 1];
};

static struct {
	double first, last;
	int streams;
} heard[EVENTS];

static int streams, opened;
static long disorder;

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec + time.tv_nsec / 1e9;
}

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static void hear_event(struct stream *stream, const char *text, double time)
{
	const char *field = strstr(text, "\"value\":\"");
	long value = field ? atol(field + 9) : 0;
	int event = stream->events++ % EVENTS;

	if (stream->events > 1 && value != stream->value + 1)
		disorder++;
	stream->value = value;
	if (!heard[event].streams++)
		heard[event].first = time;
	heard[event].last = time;
	if (heard[event].streams == streams) {
		printf("{\"event\": %d, \"value\": %ld, \"first\": %.6f, \"last\": %.6f, \"disorder\": %ld}\n",
		       stream->events, value, heard[event].first, heard[event].last, disorder);
		heard[event].streams = 0;
	}
}

/* Take one frame, or the response's head, from the start of the buffer; return its length, 0 if it is incomplete. */
static size_t take(struct stream *stream, double time)
{
	unsigned char *buffer = stream->buffer, saved;
	size_t head = 2, length;

	if (!stream->open) {
		char *end;

		buffer[stream->filled] = 0;
		end = strstr((char *) buffer, "\r\n\r\n");
		if (!end)
			return 0;
		if (strncmp((char *) buffer + 9, "101", 3))
			die("no WebSocket");
		stream->open = 1;
		if (++opened == streams)
			printf("{\"open\": %d}\n", opened);
		return end + 4 - (char *) buffer;
	}
	if (stream->filled < head)
		return 0;
	length = buffer[1] & 0x7f;
	if (length == 126) {
		head = 4;
		if (stream->filled < head)
			return 0;
		length = buffer[2] << 8 | buffer[3];
	}
	if (head + length > BUFFER)
		die("an event is too long");
	if (stream->filled < head + length)
		return 0;
	if ((buffer[0] & 0xf) == PING) {
		unsigned char pong[6 + 125] = { 0x8a, 0x80 | length };

		memcpy(pong + 6, buffer + head, length);
		send(stream->socket, pong, 6 + length, MSG_NOSIGNAL);
	} else if ((buffer[0] & 0xf) == TEXT) {
		saved = buffer[head + length];
		buffer[head + length] = 0;
		hear_event(stream, (char *) buffer + head, time);
		buffer[head + length] = saved;
	}
	return head + length;
}

int main(int count, char **words)
{
	static struct epoll_event ready[1024];
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	struct epoll_event event = { .events = EPOLLIN };
	struct rlimit limit;
	struct stream *all;
	int poller = epoll_create1(0), asked = 0;

	if (count != 3 || strlen(words[1]) >= sizeof address.sun_path)
		return 2;
	strcpy(address.sun_path, words[1]);
	streams = atoi(words[2]);
	getrlimit(RLIMIT_NOFILE, &limit);
	limit.rlim_cur = limit.rlim_max;
	setrlimit(RLIMIT_NOFILE, &limit);
	setvbuf(stdout, NULL, _IOLBF, 0);
	all = calloc(streams, sizeof *all);
	if (epoll_ctl(poller, EPOLL_CTL_ADD, 0, &event) < 0)
		die("epoll_ctl");
	for (;;) {
		int number;

		/* More would be refused: the number of a process's pending connections is limited. */
		for (; asked < streams && asked - opened < AT_ONCE; asked++) {
			struct stream *stream = &all[asked];

			stream->socket = socket(AF_UNIX, SOCK_STREAM, 0);
			if (stream->socket < 0 || connect(stream->socket, (void *) &address, sizeof address) < 0)
				die("connect");
			event.data.ptr = stream;
			if (epoll_ctl(poller, EPOLL_CTL_ADD, stream->socket, &event) < 0)
				die("epoll_ctl");
			if (send(stream->socket, REQUEST, sizeof REQUEST - 1, MSG_NOSIGNAL) < 0)
				die("send");
		}
		number = epoll_wait(poller, ready, 1024, -1);

		for (int one = 0; one < number; one++) {
			struct stream *stream = ready[one].data.ptr;
			size_t taken;
			ssize_t got;

			if (!stream)
				return 0;
			got = recv(stream->socket, stream->buffer + stream->filled, BUFFER - stream->filled, 0);
			if (got <= 0)
				die("a stream has ended");
			stream->filled += got;
			while ((taken = take(stream, now()))) {
				stream->filled -= taken;
				memmove(stream->buffer, stream->buffer + taken, stream->filled);
			}
		}
	}
}
