"""What `dlm` says with its exit status, for the scripts that start it."""

DONE = 0
REFUSED = 1  # or failed, with a sentence on stderr: the same command would fail again
EXIT_USAGE = 2  # arguments
DOES_NOT_FIT = 3  # what was planned
STOPPED = 75  # by SIGTERM, everything saved: the same command goes on
PEER_LOST = 76  # another process of the run has died: start all of them again, and the run goes on
INTERRUPTED = 130  # by Ctrl-C
KILLED = 128  # plus the number of the signal
