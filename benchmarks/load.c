/* A load generator for HTTP over a Unix socket: one thread, many connections, each with one request at a time.
 *
 *   load SOCKET keep|new|calm CONNECTIONS SECONDS PATH...
 *
 * SOCKET is a path. As CID@PATH, each connection is first bound to an abstract address that names the CID, for a relay that
 * takes Unix sockets in the place of vsock (tests/harness/vmm.py).
 *
 * keep: each connection sends its next request when the response to the last one is complete.
 * new: each request has a connection of its own, which the client closes, as curl does.
 * calm: connections are kept, and each asks once a second, evenly spread. Prints "ready" when all are open.
 * With several paths, requests take turns through them.
 * Prints one JSON object; times are in microseconds, of a request from before connect(2) or send(2) to its last byte.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { MOST = 4096, BUFFER = 1 << 16, SAMPLES = 16 << 20 };

/* The first part of a run is not counted: connections are made, caches fill. */
static const double WARM_UP = 0.1;

struct connection {
	int socket;
	double began;
	size_t received, expected;
	char answer[BUFFER];
};

static struct connection connections[MOST];
static struct sockaddr_un address = { .sun_family = AF_UNIX };
static char **requests;
static int paths, next_path, poller, fresh, calm;
static long cid;
static float *samples;
static size_t counted, errors;

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

static void open_connection(struct connection *connection)
{
	struct epoll_event event = { .events = EPOLLIN, .data.ptr = connection };

	connection->socket = socket(AF_UNIX, SOCK_STREAM, 0);
	if (cid) {
		static long number;
		struct sockaddr_un own = { .sun_family = AF_UNIX };
		int length = sprintf(own.sun_path + 1, "cid/%ld/%d/%ld", cid, getpid(), number++);

		if (bind(connection->socket, (void *) &own, offsetof(struct sockaddr_un, sun_path) + 1 + length) < 0)
			die("bind");
	}
	if (connection->socket < 0 || connect(connection->socket, (void *) &address, sizeof address) < 0)
		die("connect");
	if (epoll_ctl(poller, EPOLL_CTL_ADD, connection->socket, &event) < 0)
		die("epoll_ctl");
}

static void ask(struct connection *connection)
{
	const char *request = requests[next_path];
	size_t length = strlen(request);

	next_path = (next_path + 1) % paths;
	connection->received = connection->expected = 0;
	connection->began = now();
	if (fresh || connection->socket < 0)
		open_connection(connection);
	if (send(connection->socket, request, length, MSG_NOSIGNAL) != (ssize_t) length)
		errors++;
}

/* Return the length of the complete response; 0 if its head is incomplete. */
static size_t length_of(struct connection *connection)
{
	char *end, *field;

	connection->answer[connection->received] = 0;
	end = strstr(connection->answer, "\r\n\r\n");
	if (!end)
		return 0;
	field = strcasestr(connection->answer, "\r\ncontent-length:");
	return end + 4 - connection->answer + (field && field < end ? strtoul(field + 17, NULL, 10) : 0);
}

/* Read the received bytes; return whether the response is complete. */
static int hear(struct connection *connection)
{
	size_t room = BUFFER - 1 - connection->received;
	ssize_t got = recv(connection->socket, connection->answer + connection->received, room, 0);

	if (got <= 0) {
		/* The server has closed the connection before the response. */
		errors++;
		close(connection->socket);
		connection->socket = -1;
		if (!fresh && !calm)
			open_connection(connection);
		connection->received = 0;
		return 1;
	}
	connection->received += got;
	if (!connection->expected)
		connection->expected = length_of(connection);
	if (!connection->expected || connection->received < connection->expected)
		return 0;
	if (strncmp(connection->answer + 9, "200", 3) || connection->received > connection->expected)
		errors++;
	if (fresh)
		close(connection->socket);
	return 1;
}

static int by_size(const void *one, const void *other)
{
	float a = *(const float *) one, b = *(const float *) other;

	return a < b ? -1 : a > b;
}

int main(int count, char **words)
{
	struct epoll_event events[MOST];
	double began, start, end, time;
	long asked = 0;
	int number;

	if (count < 6 || strlen(words[1]) >= sizeof address.sun_path) {
		fprintf(stderr, "usage: load SOCKET keep|new|calm CONNECTIONS SECONDS PATH...\n");
		return 2;
	}
	if (strchr(words[1], '@')) {
		cid = atol(words[1]);
		words[1] = strchr(words[1], '@') + 1;
	}
	strcpy(address.sun_path, words[1]);
	fresh = !strcmp(words[2], "new");
	calm = !strcmp(words[2], "calm");
	number = atoi(words[3]);
	if (number < 1 || number > MOST)
		return 2;
	paths = count - 5;
	requests = calloc(paths, sizeof *requests);
	for (int path = 0; path < paths; path++)
		if (asprintf(&requests[path], "GET %s HTTP/1.1\r\nHost: localhost\r\nUser-Agent: load\r\nAccept: */*\r\n\r\n",
			     words[5 + path]) < 0)
			die("asprintf");
	samples = malloc(SAMPLES * sizeof *samples);
	poller = epoll_create1(0);
	for (int one = 0; one < number; one++) {
		if (!fresh)
			open_connection(&connections[one]);
		if (!calm)
			ask(&connections[one]);
	}
	if (calm) {
		puts("ready");
		fflush(stdout);
	}
	began = now();
	start = began + WARM_UP;
	end = start + atof(words[4]);
	do {
		int ready = epoll_wait(poller, events, MOST, calm ? 10 : 1000);

		for (; calm && asked < (now() - began) * number; asked++)
			ask(&connections[asked % number]);

		for (int one = 0; one < ready; one++) {
			struct connection *connection = events[one].data.ptr;

			if (!hear(connection))
				continue;
			time = now();
			if (time >= start && counted < SAMPLES)
				samples[counted++] = (time - connection->began) * 1e6;
			if (!calm)
				ask(connection);
		}
		time = now();
	} while (time < end);
	if (!counted) {
		fprintf(stderr, "no answer\n");
		return 1;
	}
	qsort(samples, counted, sizeof *samples, by_size);
	printf("{\"requests\": %zu, \"errors\": %zu, \"seconds\": %.6f, \"p50\": %.1f, \"p99\": %.1f, \"max\": %.1f}\n", counted,
	       errors, time - start, samples[counted / 2], samples[counted * 99 / 100], samples[counted - 1]);
	return 0;
}
