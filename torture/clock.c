/* Shifts the time of day of a process by CLOCK_SHIFT seconds, as a host with a wrong clock does. Loaded by LD_PRELOAD.
 *
 * Monotonic clocks stay as they are. A deadline in the time of day is shifted back before the kernel sees it, so waits
 * last as long as their caller wants. libfaketime 0.9.10 does not do so: librdkafka's waits hang or spin under it. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <threads.h>
#include <time.h>
#include <unistd.h>

#define SINCE_2001 1000000000 /* smaller deadlines are monotonic: seconds since the start of the host */
#define ORIGINAL(name, ...) ((typeof(&name))dlsym(RTLD_NEXT, #name))(__VA_ARGS__)
#define VERSION(name, version, ...) ((typeof(&name))dlvsym(RTLD_NEXT, #name, version))(__VA_ARGS__)
#ifdef __x86_64__
#define CONDITIONS "GLIBC_2.3.2"
#else
#define CONDITIONS "GLIBC_2.17"
#endif

static long shift(void) {
    const char *text = getenv("CLOCK_SHIFT");
    return text ? atol(text) : 0;
}

static struct timespec real(const struct timespec *deadline) {
    struct timespec at = *deadline;
    if (at.tv_sec > SINCE_2001) at.tv_sec -= shift();
    return at;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    int failed = syscall(SYS_clock_gettime, clock, now);
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += shift();
    return failed;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    (void)zone;
    struct timespec at;
    int failed = clock_gettime(CLOCK_REALTIME, &at);
    now->tv_sec = at.tv_sec;
    now->tv_usec = at.tv_nsec / 1000;
    return failed;
}

time_t time(time_t *now) {
    struct timespec at;
    clock_gettime(CLOCK_REALTIME, &at);
    if (now) *now = at.tv_sec;
    return at.tv_sec;
}

int timespec_get(struct timespec *now, int base) { return clock_gettime(CLOCK_REALTIME, now) ? 0 : base; }

int pthread_cond_timedwait(pthread_cond_t *condition, pthread_mutex_t *mutex, const struct timespec *deadline) {
    struct timespec at = real(deadline);
    return VERSION(pthread_cond_timedwait, CONDITIONS, condition, mutex, &at);
}

int cnd_timedwait(cnd_t *condition, mtx_t *mutex, const struct timespec *deadline) {
    struct timespec at = real(deadline);
    return ORIGINAL(cnd_timedwait, condition, mutex, &at);
}

int pthread_mutex_timedlock(pthread_mutex_t *mutex, const struct timespec *deadline) {
    struct timespec at = real(deadline);
    return ORIGINAL(pthread_mutex_timedlock, mutex, &at);
}

int sem_timedwait(sem_t *semaphore, const struct timespec *deadline) {
    struct timespec at = real(deadline);
    return ORIGINAL(sem_timedwait, semaphore, &at);
}
