/* What a hostile guest does to the socket, from C, so that the attacker is not what is slow.
 *
 *   attack SOCKET MANNER COUNT [REQUEST]
 *
 * REQUEST is sent as it is, after "\n" in it became CR LF. MANNER, always COUNT at a time, until it is killed:
 *
 *   keep    ask on a connection that is kept, again as soon as anything is answered
 *   pace    the same, five times a second on each connection, whatever is answered
 *   head    ask, and close the connection as soon as anything is answered
 *   stuck   ask, and take nothing
 *   drain   ask once, and take all that comes
 *   idle    connect, and say nothing
 *   fork    COUNT processes that connect, ask, take the answer and close, again and again
 *   nest    the same, each process at the end of a chain of 31 PID namespaces
 *
 * A connection that is closed is replaced by another one. Prints "ready" when all have begun.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { MOST = 4096, DEPTH = 31, PACE = 5 };

static struct sockaddr_un address = { .sun_family = AF_UNIX };
static char *request = "";
static const char *manner;
static char answer[1 << 18];
static int held[MOST];
/* Processes wait for its end, so that all begin at the same time, and none keeps the others from being forked. */
static int start[2];

static int is(const char *name)
{
	return !strcmp(manner, name);
}

static void die(const char *what)
{
	perror(what);
	exit(1);
}

/* A connection on which the request was sent; waits while the service has no room. */
static int begin(int flags)
{
	size_t length = strlen(request);
	int connection;

	for (;;) {
		connection = socket(AF_UNIX, SOCK_STREAM | flags, 0);
		if (connection < 0)
			die("socket");
		if (!connect(connection, (void *) &address, sizeof address))
			break;
		close(connection);
		usleep(1000);
	}
	if (length && send(connection, request, length, MSG_NOSIGNAL) < 0 && errno != EAGAIN && errno != EPIPE)
		die("send");
	return connection;
}

static void one_process(int *begun)
{
	char none;

	__atomic_add_fetch(begun, 1, __ATOMIC_RELAXED);
	if (read(start[0], &none, 1) < 0)
		die("read");
	for (;;) {
		int connection = begin(0);

		while (recv(connection, answer, sizeof answer, 0) == sizeof answer)
			;
		close(connection);
	}
}

/* Go down into one PID namespace after the other; the last process serves. */
static void nested_process(int depth, int *begun)
{
	for (int level = 0; level < depth; level++) {
		pid_t child;

		if (unshare(CLONE_NEWPID) < 0)
			die("unshare");
		child = fork();
		if (child < 0)
			die("fork");
		if (child) {
			waitpid(child, NULL, 0);
			_exit(0);
		}
	}
	one_process(begun);
}

static void processes(int count)
{
	int *begun = mmap(NULL, sizeof *begun, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	if (pipe(start) < 0)
		die("pipe");
	for (int one = 0; one < count; one++) {
		pid_t child = fork();

		if (child < 0)
			die("fork");
		if (child)
			continue;
		close(start[1]);
		nested_process(is("nest") ? DEPTH : 0, begun);
	}
	while (__atomic_load_n(begun, __ATOMIC_RELAXED) < count)
		usleep(10000);
	close(start[1]);
	puts("ready");
	fflush(stdout);
	pause();
}

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec + time.tv_nsec / 1e9;
}

/* Ask on each connection whose time has come. */
static void pace(int count, double began)
{
	static long asked;

	for (; asked < (now() - began) * count * PACE; asked++)
		send(held[asked % count], request, strlen(request), MSG_NOSIGNAL | MSG_DONTWAIT);
}

static void connections(int count)
{
	struct epoll_event events[256];
	int poller = epoll_create1(0);
	double began = now();

	for (int one = 0; one < count; one++) {
		struct epoll_event event = { .events = EPOLLIN | EPOLLRDHUP, .data.u32 = one };

		held[one] = begin(0);
		if (is("stuck"))
			event.events = EPOLLHUP;
		epoll_ctl(poller, EPOLL_CTL_ADD, held[one], &event);
	}
	puts("ready");
	fflush(stdout);
	for (;;) {
		int ready = epoll_wait(poller, events, 256, is("pace") ? 10 : 1000);

		if (is("pace"))
			pace(count, began);
		for (int one = 0; one < ready; one++) {
			int place = events[one].data.u32, connection = held[place];
			ssize_t got = is("stuck") ? 0 : recv(connection, answer, sizeof answer, MSG_DONTWAIT);

			if (got < 0 && errno == EAGAIN)
				continue;
			if (got > 0 && (is("drain") || is("idle") || is("pace")))
				continue;
			if (got > 0 && is("keep") && send(connection, request, strlen(request), MSG_NOSIGNAL) > 0)
				continue;
			close(connection);
			held[place] = begin(0);
			events[one].events = is("stuck") ? EPOLLHUP : EPOLLIN | EPOLLRDHUP;
			epoll_ctl(poller, EPOLL_CTL_ADD, held[place], &events[one]);
		}
	}
}

int main(int count, char **words)
{
	int number;

	if (count < 4 || strlen(words[1]) >= sizeof address.sun_path) {
		fprintf(stderr, "usage: attack SOCKET MANNER COUNT [REQUEST]\n");
		return 2;
	}
	strcpy(address.sun_path, words[1]);
	manner = words[2];
	number = atoi(words[3]);
	if (number < 1 || number > MOST)
		return 2;
	if (count > 4) {
		char *to = request = malloc(2 * strlen(words[4]) + 1);

		for (const char *from = words[4]; *from; from++) {
			if (*from == '\n')
				*to++ = '\r';
			*to++ = *from;
		}
		*to = 0;
	}
	if (is("fork") || is("nest"))
		processes(number);
	else
		connections(number);
	return 0;
}
