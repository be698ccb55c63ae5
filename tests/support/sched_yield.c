/* Ranks that wait, in Horovod or in Open MPI, call sched_yield all the time, each a core's whole time. With this
   library before libc they sleep, so that two jobs can share two cores. */
#include <time.h>

int sched_yield(void) {
  struct timespec moment = {0, 50000};
  return nanosleep(&moment, 0);
}
