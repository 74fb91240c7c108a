// Items of work on a pool of threads.
//
// Not OpenMP: its regions end when every thread has arrived, so one that the system has descheduled
// (for a gateway or a broker on the same cores) holds up all; a step of 20 ms then takes 200. Here
// the caller takes items like everybody else and waits only for those that another thread has
// begun.
#pragma once

#include <stdint.h>

typedef void (*Work)(void *data, int64_t item);

// work(data, 0) ... work(data, count - 1), in any order, on at most `num_threads` threads with the
// caller's.
void run_items(Work work, void *data, int64_t count, int64_t num_threads);

// Small work is not worth a second thread.
template <typename Function>
static inline void for_each(int64_t num_threads, int64_t count, bool is_large,
                            const Function &function) {
    if (!is_large || num_threads < 2 || count < 2) {
        for (int64_t item = 0; item < count; item++)
            function(item);
        return;
    }
    Work work = [](void *data, int64_t item) { (*static_cast<const Function *>(data))(item); };
    run_items(work, const_cast<Function *>(&function), count, num_threads);
}
