//! Time of an optimizer step by method, shape and rank, of a whole model, and of a renewal of the subspace by DCT and by SVD.
//!
//! ```text
//! cargo bench -p lowrank-optim --features flex
//! ```
//!
//! Compare every figure with that of AdamW for the same shape in the same run.

use std::hint::black_box;
use std::time::Duration;

use burn::optim::Optimizer;
use burn::tensor::{Device, Distribution, Tensor};
use criterion::{BenchmarkGroup, Criterion, criterion_group, criterion_main, measurement::WallTime};
use lowrank_optim::{
    AdamW8bitConfig, AdamWConfig, ApolloConfig, DctAdamWConfig, DctBasis, DctColumns, DionConfig, ErrorFeedback,
    FiraConfig, FrugalConfig, GaLoreConfig, LdAdamConfig, MatrixId, MuonConfig, Norm, Projector, ProjectorKind,
    Renewal, Svd, TrionConfig,
};

/// Attention and feed-forward matrices of a model of width 512, as Burn stores them.
const SHAPES: [[usize; 2]; 3] = [[512, 512], [512, 1376], [1376, 512]];

const RANKS: [usize; 2] = [32, 128];

fn steps(group: &mut BenchmarkGroup<WallTime>, name: &str, shape: [usize; 2], optimizer: impl Optimizer) {
    let device = Device::default();
    let normal = || Tensor::<2>::random(shape, Distribution::Normal(0.0, 1.0), &device);
    let (mut w, mut state) = (normal(), None);
    let gradients: Vec<Tensor<2>> = (0..4).map(|_| normal()).collect();
    let mut next = 0;
    group.bench_function(format!("{name}/{}x{}", shape[0], shape[1]), |bencher| {
        bencher.iter(|| {
            next = (next + 1) % gradients.len();
            // An unshared gradient, as a backward pass produces it.
            let g = gradients[next].clone().mul_scalar(1.0);
            let own = std::mem::replace(&mut w, Tensor::empty([0, 0], &device));
            (w, state) = optimizer.step(1e-4, own, g, state.take());
        });
        black_box(&w);
    });
}

fn step(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("step");
    group.sample_size(20).warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1));
    for shape in SHAPES {
        steps(&mut group, "adamw", shape, AdamWConfig::new().build());
        steps(&mut group, "adamw-8bit", shape, AdamW8bitConfig::new().build());
        for rank in RANKS {
            let named = |name: &str| format!("{name}/rank-{rank}");
            steps(&mut group, &named("dct-adamw"), shape, DctAdamWConfig::new(rank).build());
            let plain = DctAdamWConfig::new(rank).with_error_feedback(ErrorFeedback::None);
            steps(&mut group, &named("dct-adamw-no-feedback"), shape, plain.build());
            let long = 1_000_000;
            steps(&mut group, &named("galore"), shape, GaLoreConfig::new(rank).with_update_proj_gap(long).build());
            steps(&mut group, &named("fira"), shape, FiraConfig::new(rank).with_update_proj_gap(long).build());
            steps(&mut group, &named("ldadam"), shape, LdAdamConfig::new(rank).build());
            steps(&mut group, &named("apollo"), shape, ApolloConfig::new().with_rank(rank).build());
            steps(&mut group, &named("trion"), shape, TrionConfig::new(rank).build());
            steps(&mut group, &named("dion"), shape, DionConfig::new().with_rank(rank).build());
        }
        let columns = FrugalConfig::new().with_projector(ProjectorKind::Columns);
        steps(&mut group, "frugal-columns", shape, columns.build());
        steps(&mut group, "muon", shape, MuonConfig::new().build());
    }
    group.finish();
}

/// One step of every matrix of a LLaMA of 33.7 M parameters (width 512, 8 layers, vocabulary 8192), the subspace renewed at every step.
fn whole(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("whole");
    group.sample_size(10).warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(5));
    let block = [[512, 512], [512, 512], [512, 512], [512, 512], [512, 1376], [512, 1376], [1376, 512]];
    let hidden: Vec<[usize; 2]> = block.repeat(8);
    let rest = vec![[8192, 512], [512, 8192]];
    let others = AdamWConfig::new().build();
    model(&mut group, "adamw", &others, &others, [&hidden, &rest]);
    model(&mut group, "dct-adamw-rank-128", &DctAdamWConfig::new(128).build(), &others, [&hidden, &rest]);
    group.finish();
}

fn model<H: Optimizer, R: Optimizer>(
    group: &mut BenchmarkGroup<WallTime>,
    name: &str,
    hidden: &H,
    rest: &R,
    shapes: [&[[usize; 2]]; 2],
) {
    let device = Device::default();
    let normal = |shape: &[usize; 2]| Tensor::<2>::random(*shape, Distribution::Normal(0.0, 1.0), &device);
    let mut hidden_weights: Vec<_> = shapes[0].iter().map(|shape| (normal(shape), normal(shape), None)).collect();
    let mut other_weights: Vec<_> = shapes[1].iter().map(|shape| (normal(shape), normal(shape), None)).collect();
    group.bench_function(name, |bencher| {
        bencher.iter(|| {
            for (w, g, state) in &mut hidden_weights {
                let own = std::mem::replace(w, Tensor::empty([0, 0], &device));
                (*w, *state) = hidden.step(1e-4, own, g.clone(), state.take());
            }
            for (w, g, state) in &mut other_weights {
                let own = std::mem::replace(w, Tensor::empty([0, 0], &device));
                (*w, *state) = rest.step(1e-4, own, g.clone(), state.take());
            }
        });
    });
}

fn renewal(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("renewal");
    group.sample_size(10).warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(2));
    for shape in SHAPES {
        let gradient = Tensor::<2>::random(shape, Distribution::Normal(0.0, 1.0), &Device::default());
        let renewal = Renewal {
            gradient: &gradient,
            right: shape[0] >= shape[1],
            rank: 128,
            previous: None,
            seed: 0,
            place: MatrixId { key: 0, number: 0, count: 1 },
            count: 0,
        };
        let dct = |fft| DctColumns { basis: DctBasis::Dct3, fft, norm: Norm::L1, weighted: false };
        let projectors: [(&str, &dyn Projector); 3] = [("fft", &dct(true)), ("matmul", &dct(false)), ("svd", &Svd)];
        for (name, projector) in projectors {
            group.bench_function(format!("{name}/{}x{}", shape[0], shape[1]), |bencher| {
                bencher.iter(|| black_box(projector.choose(&renewal)));
            });
        }
    }
    group.finish();
}

criterion_group!(benches, step, whole, renewal);
criterion_main!(benches);
