// The pool: threads that wait for items, first awake for the time between two kernels, then asleep.
//
// `ticket` is the job's number and how many of its items nobody has taken: one compare-and-swap
// takes the last of them. A thread that comes late finds another number there, or none left, and
// touches nothing of a job that is over.
#include "parallel.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace {

constexpr int64_t MAX_THREADS = 256;
// Some 2 ms awake: longer than the gaps between kernels, and than most between two steps.
constexpr int SPINS = 150000;

struct alignas(64) Pool {
    uint64_t ticket = 0;          // job number << 32 | items left to take
    alignas(64) int64_t open = 0; // items not finished
    alignas(64) uint32_t wakeups = 0;
    uint32_t num_asleep = 0;
    Work work = nullptr;
    void *data = nullptr;
    int64_t num_helpers = 0;
    pthread_mutex_t owner = PTHREAD_MUTEX_INITIALIZER;
};

Pool pool;

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#else
    asm volatile("yield");
#endif
}

bool take_item() {
    uint64_t seen = __atomic_load_n(&pool.ticket, __ATOMIC_ACQUIRE);
    while ((uint32_t)seen)
        if (__atomic_compare_exchange_n(&pool.ticket, &seen, seen - 1, true, __ATOMIC_ACQUIRE,
                                        __ATOMIC_ACQUIRE)) {
            pool.work(pool.data, (uint32_t)seen - 1);
            __atomic_fetch_sub(&pool.open, 1, __ATOMIC_RELEASE);
            return true;
        }
    return false;
}

bool has_item() {
    return (uint32_t)__atomic_load_n(&pool.ticket, __ATOMIC_SEQ_CST) != 0;
}

void sleep_until_work() {
    const uint32_t before = __atomic_load_n(&pool.wakeups, __ATOMIC_SEQ_CST);
    __atomic_fetch_add(&pool.num_asleep, 1, __ATOMIC_SEQ_CST);
    if (!has_item())
        syscall(SYS_futex, &pool.wakeups, FUTEX_WAIT_PRIVATE, before, nullptr, nullptr, 0);
    __atomic_fetch_sub(&pool.num_asleep, 1, __ATOMIC_SEQ_CST);
}

void *help(void *) {
    for (;;) {
        for (int spin = 0; spin < SPINS; spin++)
            if (has_item() && take_item())
                spin = 0;
            else
                relax();
        sleep_until_work();
    }
}

// Fewer than asked for, if the system has no more: the caller does their work.
void add_helpers(int64_t wanted) {
    pthread_attr_t detached;
    pthread_attr_init(&detached);
    pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
    for (pthread_t thread; pool.num_helpers < wanted; pool.num_helpers++)
        if (pthread_create(&thread, &detached, help, nullptr))
            break;
    pthread_attr_destroy(&detached);
}

// A child of fork has the pool's memory and none of its threads.
void forget_helpers() {
    pool = Pool{};
}

__attribute__((constructor)) void watch_forks() {
    pthread_atfork(nullptr, nullptr, forget_helpers);
}

} // namespace

void run_items(Work work, void *data, int64_t count, int64_t num_threads) {
    const bool is_ours =
        !pthread_mutex_trylock(&pool.owner); // two engines in a process: the second works alone
    if (!is_ours) {
        for (int64_t item = 0; item < count; item++)
            work(data, item);
        return;
    }
    const int64_t wanted = (num_threads < MAX_THREADS ? num_threads : MAX_THREADS) - 1;
    if (pool.num_helpers < wanted)
        add_helpers(wanted);
    pool.work = work;
    pool.data = data;
    __atomic_store_n(&pool.open, count, __ATOMIC_RELAXED);
    const uint64_t job = (pool.ticket >> 32) + 1;
    __atomic_store_n(&pool.ticket, job << 32 | (uint64_t)count, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&pool.num_asleep, __ATOMIC_SEQ_CST)) {
        __atomic_fetch_add(&pool.wakeups, 1, __ATOMIC_SEQ_CST);
        syscall(SYS_futex, &pool.wakeups, FUTEX_WAKE_PRIVATE, wanted, nullptr, nullptr, 0);
    }
    while (take_item()) {
    }
    for (int spin = 0; __atomic_load_n(&pool.open, __ATOMIC_ACQUIRE); spin++)
        if (spin < SPINS)
            relax();
        else
            sched_yield();
    pthread_mutex_unlock(&pool.owner);
}
