// lpd_bench_cpu: every operator, with the code of every instruction set this processor has, at every named shape.
// Counters come from the median of all calls: GF/s or GB/s, `share` of the peak measured right before and after with
// the same threads, and `spread`, the interquartile range over the median. LPD_BENCH_THREADS sets the threads.
#include "cpu_bench.h"

#include <benchmark/benchmark.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>

#include "peak_loops.h"

namespace lpd::bench {
namespace {

// Threads that spin while they wait, so that handing out a call costs well below a microsecond.
class ThreadPool {
 public:
  explicit ThreadPool(int threads) : threads_(threads) {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { work(i); });
  }
  ~ThreadPool() {
    kernel_ = nullptr;
    call_.fetch_add(1, std::memory_order_release);
    for (std::thread& worker : workers_) worker.join();
  }

  int threads() const { return threads_; }

  // The calling thread does the first share of the items, as equal as whole items allow.
  void run(const std::function<void(int64_t, int64_t)>& kernel, int64_t items) {
    kernel_ = &kernel;
    items_ = items;
    busy_.store(threads_ - 1, std::memory_order_relaxed);
    call_.fetch_add(1, std::memory_order_release);
    do_share(0);
    wait([&] { return busy_.load(std::memory_order_acquire) == 0; });
  }

 private:
  template <class Condition>
  static void wait(Condition condition) {
    for (int64_t spins = 1; !condition(); ++spins) {
      if (spins % 4096 == 0) std::this_thread::yield();
    }
  }

  void work(int index) {
    for (int64_t call = 1;; ++call) {
      wait([&] { return call_.load(std::memory_order_acquire) >= call; });
      if (kernel_ == nullptr) return;
      do_share(index);
      busy_.fetch_sub(1, std::memory_order_release);
    }
  }

  void do_share(int index) const {
    const int64_t share = (items_ + threads_ - 1) / threads_;
    const int64_t begin = std::min(items_, index * share), end = std::min(items_, begin + share);
    if (begin < end) (*kernel_)(begin, end);
  }

  const int threads_;
  std::vector<std::thread> workers_;
  const std::function<void(int64_t, int64_t)>* kernel_ = nullptr;
  int64_t items_ = 0;
  alignas(64) std::atomic<int64_t> call_{0};
  alignas(64) std::atomic<int> busy_{0};
};

int default_threads() {
  const char* text = std::getenv("LPD_BENCH_THREADS");
  const int threads = text != nullptr ? std::atoi(text) : static_cast<int>(std::thread::hardware_concurrency());
  return std::max(threads, 1);
}

template <class Call>
double seconds(Call call) {
  const auto begin = std::chrono::steady_clock::now();
  call();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

double quantile(std::vector<double>& times, double q) {
  const auto at = times.begin() + static_cast<std::ptrdiff_t>(q * static_cast<double>(times.size() - 1));
  std::nth_element(times.begin(), at, times.end());
  return *at;
}

// Median time of a call that is repeated for a hundredth of a second.
template <class Call>
double median_time(Call call) {
  call();
  std::vector<double> times;
  double total = 0.0;
  while (total < 0.01 || times.size() < 5) {
    times.push_back(seconds(call));
    total += times.back();
  }
  return quantile(times, 0.5);
}

const PeakLoops& peak_loops() {
#if defined(LPD_X86)
  if (cpu_isa() == "avx512") return avx512::kPeakLoops;
  if (cpu_isa() == "avx2") return avx2::kPeakLoops;
#endif
  return scalar::kPeakLoops;
}

// The processor's peak for a call that does `flops` or moves `bytes`: FMAs on registers, or a copy of as many bytes,
// read and written together, between buffers as warm as those of the call.
class Peak {
 public:
  Peak(ThreadPool& pool, const Work& work) : pool_(pool), by_flops_(work.flops > 0) {
    if (by_flops_) return;
    const auto bytes = static_cast<int64_t>(work.bytes);
    share_ = (bytes / (2 * 4 * pool.threads()) + 63) / 64 * 64;
    from_ = random_floats(share_ * pool.threads());
    to_ = from_;
  }

  // FLOP or bytes per second.
  double measure() {
    if (by_flops_) return measure_fma();
    const PeakLoops& loops = peak_loops();
    const double moved = 2.0 * 4 * static_cast<double>(to_.size());
    const double by_loop =
        copy_time([&](int64_t i) { loops.copy(to_.data() + i * share_, from_.data() + i * share_, share_); });
    const double by_library = copy_time([&](int64_t i) {
      std::memcpy(to_.data() + i * share_, from_.data() + i * share_, static_cast<size_t>(share_) * sizeof(float));
    });
    return moved / std::min(by_loop, by_library);
  }

 private:
  double measure_fma() {
    constexpr int64_t kRounds = 20000;  // about 0.1 ms
    std::atomic<double> flops{0.0};
    const std::function<void(int64_t, int64_t)> loop = [&](int64_t, int64_t) {
      float values[14];
      for (float& value : values) value = 0.5f;
      flops.store(peak_loops().fma(kRounds, values), std::memory_order_relaxed);
      benchmark::DoNotOptimize(values);
    };
    const double time = median_time([&] { pool_.run(loop, pool_.threads()); });
    return flops.load() * pool_.threads() / time;
  }

  template <class Copy>
  double copy_time(Copy copy) {
    const std::function<void(int64_t, int64_t)> shares = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) copy(i);
    };
    return median_time([&] { pool_.run(shares, pool_.threads()); });
  }

  ThreadPool& pool_;
  const bool by_flops_;
  int64_t share_ = 0;  // floats that each thread copies
  Floats from_, to_;
};

// A benchmark's buffers, kept from one call of Google Benchmark to the next while it looks for the number of
// iterations.
struct Current {
  std::string name;
  Work work;
  std::unique_ptr<Peak> peak;
};

void run_benchmark(benchmark::State& state, ThreadPool& pool, const std::string& name, const std::string& isa,
                   const std::function<Work()>& make) {
  static Current current;
  set_cpu_isa(isa);
  if (current.name != name) {
    current = Current{};  // before the next is made: they need not fit into memory together
    current = Current{name, make(), nullptr};
    const Work& work = current.work;
    if (work.flops > 0 || work.bytes > 0) current.peak = std::make_unique<Peak>(pool, work);
  }
  const Work& work = current.work;
  const double peak_before = current.peak ? current.peak->measure() : 0.0;
  pool.run(work.kernel, work.items);
  std::vector<double> times;
  for (auto _ : state) {
    times.push_back(seconds([&] { pool.run(work.kernel, work.items); }));
    state.SetIterationTime(times.back());
  }
  const double median = quantile(times, 0.5);
  state.counters["median_us"] = median * 1e6;
  state.counters["spread"] = (quantile(times, 0.75) - quantile(times, 0.25)) / median;
  if (!current.peak) return;
  const double peak = 0.5 * (peak_before + current.peak->measure());
  const double rate = (work.flops > 0 ? work.flops : work.bytes) / median;
  state.counters[work.flops > 0 ? "GF/s" : "GB/s"] = rate * 1e-9;
  state.counters["share"] = rate / peak;
}

void add(ThreadPool& pool, const std::string& operator_name, const std::string& arguments,
         const std::function<Work()>& make) {
  for (const std::string& isa : available_cpu_isas()) {
    const std::string name = operator_name + "/" + isa + "/" + arguments;
    benchmark::RegisterBenchmark(
        name.c_str(),
        [&pool, name, isa, make](benchmark::State& state) { run_benchmark(state, pool, name, isa, make); })
        ->UseManualTime()
        ->Unit(benchmark::kMicrosecond);
  }
}

struct Operator {
  const char* name;
  Work (*make)(const Shape& shape, int32_t batch);
  int32_t most_images = 16;
};
constexpr Operator kOperators[] = {{"group_attention", group_attention_work},
                                   {"append_kv", append_kv_work},
                                   {"embed_rows", embed_rows_work},
                                   {"residual_layer_norm", residual_layer_norm_work},
                                   {"sample_tokens", sample_tokens_work},
                                   {"sample_tokens_k_900_p_095", sample_tokens_filtered_work},
                                   {"sample_step", sample_step_work},
                                   {"sample_step_k_900_p_095", sample_step_filtered_work},
                                   {"packed_linear", packed_linear_work},
                                   {"packed_linear_int8", packed_linear_int8_work},
                                   {"normed_linear", normed_linear_work, 1},  // simple kernels: a second for four
                                   {"residual_linear", residual_linear_work, 1}};

void add_all(ThreadPool& pool, ThreadPool& one_thread) {
  for (const Operator& op : kOperators) {
    for (const Shape& shape : kShapes) {
      for (const int32_t batch : {1, 4, 16}) {
        if (batch > op.most_images) continue;
        if (shape.schedule_index > 0 && batch > 4) continue;  // a quarter of a gigabyte of cache
        add(pool, op.name, std::string(shape.name) + "/B:" + std::to_string(batch),
            [&op, &shape, batch] { return op.make(shape, batch); });
      }
    }
  }
  add(pool, "fold_layer_norm", "fc1", fold_layer_norm_work);
  for (const Schedule& schedule : kSchedules) {
    add(one_thread, "locality_order", schedule.name, [&schedule] { return locality_order_work(schedule); });
  }
}

}  // namespace
}  // namespace lpd::bench

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  lpd::bench::ThreadPool pool(lpd::bench::default_threads()), one_thread(1);
  benchmark::AddCustomContext("threads", std::to_string(pool.threads()));
  lpd::bench::add_all(pool, one_thread);
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
}
