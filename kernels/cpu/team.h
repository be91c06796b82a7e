// Threads that work through the stages of a token together. Each begins with a share of a stage's tasks, in their order, so that it reads one
// stream of bytes, and when it has done them helps the others; whoever is done waits for the rest by spinning, which takes a tenth of the time
// of going to sleep.

#pragma once

#include <atomic>
#include <new>
#include <omp.h>
#include <sched.h>

#include "rows.h"

#define ALONE (1 << 16)  // multiplications that one thread does sooner than two agree on sharing them
#define SHARE (1 << 15)  // in a task, at least

// Vectors of rows in a task: several tasks for every thread, so that one that is held up delays no other.
static inline int64_t chunk(int64_t count, int64_t weights_each, int64_t threads) {
    if (threads == 1) return count;
    const int64_t even = (count + 8 * threads - 1) / (8 * threads), least = (SHARE + weights_each - 1) / weights_each;
    const int64_t share = even > least ? even : least;
    return (share + 7) / 8 * 8;
}

class Team {
    struct alignas(64) Counter { std::atomic<int64_t> value; };
    Counter arrived, round, *next;  // next: [stages, most], the first task of a thread's share that nobody has taken
    const int64_t most;
    int64_t threads;

  public:
    Team(int64_t most, int64_t stages) : most(most), threads(1) {
        arrived.value = 0, round.value = 0;
        next = (Counter *)aligned_alloc(64, sizeof(Counter) * (size_t)(stages * most));
        for (int64_t i = 0; i < stages * most; ++i) new (&next[i].value) std::atomic<int64_t>(0);
    }
    ~Team() { free(next); }

    // Called by every thread of a parallel region, which may have fewer than were asked for.
    void meet() {
#pragma omp master
        threads = omp_get_num_threads();
#pragma omp barrier
    }
    void wait() {
        if (threads == 1) return;
        const int64_t now = round.value.load(std::memory_order_relaxed);
        if (arrived.value.fetch_add(1, std::memory_order_acq_rel) == threads - 1) {
            arrived.value.store(0, std::memory_order_relaxed);
            round.value.store(now + 1, std::memory_order_release);
        } else {
            for (int64_t spins = 0; round.value.load(std::memory_order_acquire) == now; ++spins) {
                if (spins < 20000) _mm_pause();
                else sched_yield();  // more threads than cores
            }
        }
    }
    // The first task of a thread's share of `tasks`.
    int64_t first(int64_t thread, int64_t tasks) const { return thread * tasks / threads; }

    // Every task of a stage is done by one thread. Whoever needs what others did calls `wait` behind it.
    template <class Task> void share(int64_t stage, int64_t tasks, int64_t thread, Task task) {
        for (int64_t k = 0; k < threads; ++k) {
            const int64_t whose = (thread + k) % threads, begin = first(whose, tasks), end = first(whose + 1, tasks);
            std::atomic<int64_t> &taken = next[stage * most + whose].value;
            for (int64_t t; taken.load(std::memory_order_relaxed) < end - begin && (t = begin + taken.fetch_add(1, std::memory_order_relaxed)) < end;) task(t);
        }
    }
};
