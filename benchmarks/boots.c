/* Instances that boot: each is PID 1 of a PID namespace, and asks for the same paths once, each on a new connection.
 *
 *   boots SOCKET INSTANCES AT_ONCE PATH...
 *
 * Prints the PID of each instance's init, a line each, while none of them asks yet. When it then reads a line, so many at
 * once begin. Prints the number of failed requests in the end.
 */

#define _GNU_SOURCE
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

enum { BUFFER = 1 << 16 };

static struct sockaddr_un address = { .sun_family = AF_UNIX };
/* Who has read a byte here may ask, and puts one back. */
static int turns[2];

static void die(const char *what)
{
	perror(what);
	exit(1);
}

/* Ask for a path; return whether the answer is whole, and says 200 or 404. */
static int ask(const char *path)
{
	static char answer[BUFFER];
	char request[512], *end, *field;
	size_t received = 0, expected = 0;
	int size = snprintf(request, sizeof request, "GET %s HTTP/1.1\r\nHost: lxd\r\nAccept: */*\r\n\r\n", path);
	int connection = socket(AF_UNIX, SOCK_STREAM, 0);

	if (connection < 0 || connect(connection, (void *) &address, sizeof address) < 0)
		return 0;
	if (send(connection, request, size, MSG_NOSIGNAL) != size)
		return 0;
	while (!expected || received < expected) {
		ssize_t got = recv(connection, answer + received, BUFFER - 1 - received, 0);

		if (got <= 0)
			break;
		received += got;
		answer[received] = 0;
		end = strstr(answer, "\r\n\r\n");
		if (!end || expected)
			continue;
		field = strcasestr(answer, "\r\ncontent-length:");
		expected = end + 4 - answer + (field && field < end ? strtoul(field + 17, NULL, 10) : 0);
	}
	close(connection);
	return expected && received == expected && (!strncmp(answer + 9, "200", 3) || !strncmp(answer + 9, "404", 3));
}

static int boot(char **paths)
{
	int failed = 0;
	char turn;

	if (read(turns[0], &turn, 1) != 1)
		return 255;
	for (; *paths; paths++)
		failed += !ask(*paths);
	if (write(turns[1], &turn, 1) != 1)
		return 255;
	return failed;
}

int main(int count, char **words)
{
	int instances, status;
	long failed = 0;
	char line[16];

	if (count < 5 || strlen(words[1]) >= sizeof address.sun_path) {
		fprintf(stderr, "usage: boots SOCKET INSTANCES AT_ONCE PATH...\n");
		return 2;
	}
	strcpy(address.sun_path, words[1]);
	instances = atoi(words[2]);
	if (pipe(turns) < 0)
		die("pipe");
	for (int one = 0; one < instances; one++) {
		/* As fork(2), with a PID namespace of its own. */
		pid_t child = syscall(SYS_clone, CLONE_NEWPID | SIGCHLD, 0, 0, 0, 0);

		if (child < 0)
			die("clone");
		if (!child)
			_exit(boot(words + 4));
		printf("%d\n", child);
	}
	fflush(stdout);
	if (!fgets(line, sizeof line, stdin))
		return 1;
	for (int one = 0; one < atoi(words[3]); one++)
		if (write(turns[1], "x", 1) != 1)
			die("write");
	while (wait(&status) > 0)
		failed += WIFEXITED(status) ? WEXITSTATUS(status) : 1;
	printf("%ld\n", failed);
	return 0;
}
