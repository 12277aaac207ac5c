//! Matrix products of training at their own sizes: GFLOP/s and share of the peak, compared with `gemm` as Burn's CPU backend calls it.
//!
//! ```text
//! cargo bench -p lowrank-kernels --features flex --bench products [-- FILTER]
//! LOWRANK_SIMD=avx2 cargo bench -p lowrank-kernels --features flex --bench products
//! ```
//!
//! Both take turns, with one thread and with two; the table at the end shows the best of each, of one thread by processor time. NN is `x W` with
//! `x [rows, d_in]` and `W [d_in, d_out]`, NT the gradient of `x`, TN that of `W`.

use std::cell::RefCell;
use std::time::{Duration, Instant};

use burn::tensor::{Device, Distribution, Tensor};
use criterion::{Criterion, Throughput, criterion_group};
use lowrank_kernels::instructions::{InstructionSet, instruction_set};
use lowrank_kernels::ops;

/// Rows, inputs and outputs of a layer, and its place in the model.
const LAYERS: [(&str, [usize; 3]); 18] = [
    ("llama-9m attention", [1024, 128, 128]),
    ("llama-9m feed-forward", [1024, 128, 352]),
    ("llama-9m head", [1024, 128, 8192]),
    ("llama-60m attention", [1024, 512, 512]),
    ("llama-60m feed-forward", [1024, 512, 1376]),
    ("llama-60m feed-forward", [1024, 1376, 512]),
    ("llama-60m head", [1024, 512, 8192]),
    ("llama-130m attention", [1024, 768, 768]),
    ("llama-130m feed-forward", [1024, 768, 2048]),
    ("llama-130m feed-forward", [1024, 2048, 768]),
    ("SLTrain x A", [1024, 512, 128]),
    ("SLTrain x A B", [1024, 128, 1376]),
    ("SmolLM2-135M feed-forward", [1024, 576, 1536]),
    ("LoRA x A", [1024, 576, 8]),
    ("LoRA x A", [1024, 576, 16]),
    ("LoRA x A B", [1024, 16, 1536]),
    ("generation", [1, 576, 1536]),
    ("generation, head", [1, 576, 49152]),
];

/// Best seconds of a product: layer, kind, threads, ours or not.
type Best = RefCell<Vec<(usize, &'static str, usize, bool, f64)>>;

thread_local! {
    static BEST: Best = const { RefCell::new(Vec::new()) };
}

fn random(rows: usize, columns: usize) -> Tensor<2> {
    Tensor::random([rows, columns], Distribution::Normal(0.0, 1.0), &Device::default())
}

fn products(criterion: &mut Criterion) {
    for (number, (layer, [rows, d_in, d_out])) in LAYERS.into_iter().enumerate() {
        let (x, w, dy) = (random(rows, d_in), random(d_in, d_out), random(rows, d_out));
        let flop = 2 * rows * d_in * d_out;
        for (kind, a, b) in [("NN", x.clone(), w.clone()), ("NT", dy.clone(), w.transpose()), ("TN", x.transpose(), dy)]
        {
            let mut group = criterion.benchmark_group(format!("{layer} {rows}x{d_in}x{d_out} {kind}"));
            group.throughput(Throughput::Elements(flop as u64)).sample_size(10);
            group.warm_up_time(Duration::from_millis(10)).measurement_time(Duration::from_millis(100));
            for threads in [1, 2] {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads start");
                for ours in [false, true] {
                    ops::set_fused(ours);
                    let name = format!("{}, {threads} threads", if ours { "ours" } else { "gemm" });
                    let mut best = f64::INFINITY;
                    group.bench_function(name, |bencher| {
                        bencher.iter_custom(|count| {
                            pool.install(|| {
                                let begin = Instant::now();
                                for _ in 0..count {
                                    let begin = seconds(threads);
                                    std::hint::black_box(ops::linear(a.clone(), b.clone()));
                                    best = best.min(seconds(threads) - begin);
                                }
                                begin.elapsed()
                            })
                        });
                    });
                    BEST.with_borrow_mut(|all| all.push((number, kind, threads, ours, best)));
                }
            }
            ops::set_fused(true);
            group.finish();
        }
    }
}

/// Processor time of this thread, or the time of day where several threads work.
fn seconds(threads: usize) -> f64 {
    let clock = if threads == 1 { libc::CLOCK_THREAD_CPUTIME_ID } else { libc::CLOCK_MONOTONIC };
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the structure is borrowed mutably.
    unsafe { libc::clock_gettime(clock, &mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

/// Sums of the loop below, which do not wait for each other.
const CHAINS: usize = 12;

/// GFLOP/s of one thread that only multiplies and adds; none if there is no loop for the instruction set.
fn peak() -> Option<f64> {
    const STEPS: usize = 200_000;
    let (run, lanes): (fn(usize), usize) = match instruction_set() {
        #[cfg(target_arch = "x86_64")]
        InstructionSet::Avx512 => (peak::avx512, 16),
        #[cfg(target_arch = "x86_64")]
        InstructionSet::Avx2 => (peak::avx2, 8),
        _ => return None,
    };
    let times = (0..100).map(|_| {
        let begin = seconds(1);
        run(STEPS);
        seconds(1) - begin
    });
    let best = times.fold(f64::INFINITY, f64::min);
    Some((2 * CHAINS * lanes * STEPS) as f64 / best * 1e-9)
}

#[cfg(target_arch = "x86_64")]
mod peak {
    use std::arch::x86_64::*;
    use std::hint::black_box;

    use super::CHAINS;

    pub fn avx512(steps: usize) {
        #[target_feature(enable = "avx512f")]
        fn run(steps: usize) {
            let (factor, mut sums) = (_mm512_set1_ps(black_box(0.999)), [_mm512_set1_ps(1.0); CHAINS]);
            for _ in 0..steps {
                for sum in &mut sums {
                    *sum = _mm512_fmadd_ps(*sum, factor, factor);
                }
            }
            black_box(sums);
        }
        // SAFETY: selected only if the processor has the instructions.
        unsafe { run(steps) }
    }

    pub fn avx2(steps: usize) {
        #[target_feature(enable = "avx2,fma")]
        fn run(steps: usize) {
            let (factor, mut sums) = (_mm256_set1_ps(black_box(0.999)), [_mm256_set1_ps(1.0); CHAINS]);
            for _ in 0..steps {
                for sum in &mut sums {
                    *sum = _mm256_fmadd_ps(*sum, factor, factor);
                }
            }
            black_box(sums);
        }
        // SAFETY: selected only if the processor has the instructions.
        unsafe { run(steps) }
    }
}

criterion_group!(benches, products);

fn main() {
    benches();
    Criterion::default().configure_from_args().final_summary();
    let peak = peak();
    println!("\ninstruction set {}, peak of one thread {:.0} GFLOP/s", instruction_set(), peak.unwrap_or(f64::NAN));
    println!("{:48}{:>10}{:>10}{:>8}{:>10}{:>10}", "GFLOP/s", "gemm", "ours", "peak", "gemm x2", "ours x2");
    BEST.with_borrow(|all| {
        for product in all.chunks_exact(4) {
            let (number, kind, .., best) = product[0];
            if best.is_infinite() {
                continue;
            }
            let (layer, [rows, d_in, d_out]) = LAYERS[number];
            let [old, new, old_two, new_two] =
                [0, 1, 2, 3].map(|i| (2 * rows * d_in * d_out) as f64 / product[i].4 * 1e-9);
            let name = format!("{layer} {rows}x{d_in}x{d_out} {kind}");
            let share = 100.0 * new / peak.unwrap_or(f64::NAN);
            println!("{name:48}{old:10.1}{new:10.1}{share:7.0}%{old_two:10.1}{new_two:10.1}");
        }
    });
}
