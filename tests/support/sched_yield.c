/* sched_yield() that sleeps, in processes whose environment has TEST_SLEEPS_WHILE_WAITING.
 *
 * Horovod waits for a tensor by calling it without end. With more ranks than cores that takes the cores from the
 * threads that would bring the tensor. Open MPI waits in the same way, but for every message, so that under MPI
 * sleeping costs more than it saves.
 */

#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

int sched_yield(void) {
  static pid_t process;  /* that has read its environment: one that was forked has another */
  static int sleeps;
  if (process != getpid()) {
    sleeps = getenv("TEST_SLEEPS_WHILE_WAITING") != NULL;
    process = getpid();
  }
  if (!sleeps) return (int)syscall(SYS_sched_yield);
  struct timespec interval = {0, 50 * 1000};
  return nanosleep(&interval, NULL);
}
