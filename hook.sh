#!/bin/sh
env > /run/c1lab/env; echo "$@" >> /run/c1lab/env
cat /proc/$LXC_PID/mountinfo > /run/c1lab/mi
cat /proc/$LXC_PID/status > /run/c1lab/status
P=$(awk '/PPid/{print $2}' /proc/$LXC_PID/status); tr '\0' '|' </proc/$P/cmdline > /run/c1lab/title
nsenter -t $LXC_PID --uts uname -n > /run/c1lab/uts
