//! Each fused operation against its composed form, forward and backward, at the sizes of a LLaMA of width 512 with 4 x 256 tokens.
//!
//! ```text
//! cargo bench -p lowrank-kernels --features flex
//! ```

use std::time::Duration;

use burn::tensor::{Device, Distribution, Int, Tensor};
use criterion::{Criterion, criterion_group, criterion_main};
use lowrank_kernels::ops::{self, Rotary};

const ROWS: usize = 1024;
const WIDTH: usize = 512;
const INNER: usize = 1376;
const VOCABULARY: usize = 8192;

fn random<const D: usize>(shape: [usize; D]) -> Tensor<D> {
    Tensor::random(shape, Distribution::Normal(0.0, 1.0), &Device::default()).autodiff().require_grad()
}

fn ids(below: usize) -> Tensor<1, Int> {
    let values: Vec<i32> = (0..ROWS).map(|i| (i * 7919 % below) as i32).collect();
    Tensor::from_data(values.as_slice(), &Device::default())
}

fn both(criterion: &mut Criterion, name: &str, mut run: impl FnMut()) {
    let mut group = criterion.benchmark_group(name);
    group.sample_size(10).warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(2));
    for (form, fused) in [("fused", true), ("composed", false)] {
        ops::set_fused(fused);
        group.bench_function(form, |bencher| bencher.iter(&mut run));
    }
    ops::set_fused(true);
    group.finish();
}

fn operations(criterion: &mut Criterion) {
    let (x, gain) = (random([4, 256, WIDTH]), random([WIDTH]));
    both(criterion, "rms-norm", || {
        ops::rms_norm(x.clone(), gain.clone(), 1e-6).sum().backward();
    });
    let (gate, up) = (random([ROWS, INNER]), random([ROWS, INNER]));
    both(criterion, "swiglu", || {
        ops::swiglu(gate.clone(), up.clone()).sum().backward();
    });
    let heads = || random([4, 256, 8, 64]);
    let (q, k, v) = (heads(), heads(), heads());
    let angles = Rotary::new(64, 256, 10_000.0, &Device::default());
    both(criterion, "rotary", || {
        ops::rotary(q.clone(), &angles, 0).sum().backward();
    });
    both(criterion, "attention", || {
        ops::causal_attention(q.clone(), k.clone(), v.clone(), None).sum().backward();
    });
    let (hidden, head, targets) = (random([ROWS, WIDTH]), random([WIDTH, VOCABULARY]), ids(VOCABULARY));
    both(criterion, "linear-cross-entropy", || {
        ops::linear_cross_entropy(hidden.clone(), head.clone(), targets.clone()).backward();
    });
    let (table, words) = (random([VOCABULARY, WIDTH]), ids(VOCABULARY).reshape([4, 256]));
    both(criterion, "embedding", || {
        ops::embedding(table.clone(), words.clone()).sum().backward();
    });
    let weight = random([WIDTH, INNER]);
    both(criterion, "linear", || {
        ops::linear(hidden.clone(), weight.clone()).sum().backward();
    });
    let (weight, a, b) = (random([WIDTH, INNER]).detach(), random([WIDTH, 16]), random([16, INNER]));
    both(criterion, "low-rank-linear", || {
        ops::low_rank_linear(hidden.clone(), weight.clone(), a.clone(), b.clone(), 1.0).sum().backward();
    });
    let (a, b, values) = (random([WIDTH, 128]), random([128, INNER]), random([21_000]));
    let positions: Vec<i32> = (0..21_000).map(|i| i * 33).collect();
    let positions = Tensor::<1, Int>::from_data(positions.as_slice(), &Device::default());
    both(criterion, "sparse-low-rank", || {
        let (a, b, values) = (a.clone(), b.clone(), values.clone());
        ops::sparse_low_rank(hidden.clone(), a, b, values, positions.clone(), 0.25).sum().backward();
    });
    // A factor of NOLA's: 512 matrices of rank 16.
    let coefficients = random([512]);
    both(criterion, "mixed-draws", || {
        ops::mixed_draws(coefficients.clone(), 7, 16 * WIDTH).sum().backward();
    });
}

criterion_group!(benches, operations);
criterion_main!(benches);
