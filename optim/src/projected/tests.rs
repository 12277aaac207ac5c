//! Properties that the papers' methods must have for any numbers.

use burn::optim::Optimizer;
use burn::tensor::{Device, Tensor};
use lowrank_kernels::dct::DctBasis;
use lowrank_kernels::host::values;
use lowrank_kernels::random::normal_matrix;

use crate::matrix::{ByMatrix, ByMatrixState};
use crate::methods::adamw::AdamWConfig;
use crate::methods::apollo::ApolloConfig;
use crate::methods::dct_adamw::DctAdamWConfig;
use crate::methods::fira::FiraConfig;
use crate::methods::frugal::{FrugalConfig, InactiveRule};
use crate::methods::galore::GaLoreConfig;
use crate::methods::ldadam::LdAdamConfig;
use crate::methods::muon::{MomentumRule, MuonConfig};
use crate::methods::orthogonal::Scaling;
use crate::methods::trion::TrionConfig;
use crate::projected::config::{Inner, Norm, ProjectedConfig, ProjectorKind};
use crate::projected::projector::{DctColumns, PowerIteration, Projector, Renewal, Svd, renewal_failures};
use crate::projected::state::ProjectedState;
use crate::projected::step::Projected;
use crate::projected::subspace::Subspace;
use crate::state::error_feedback::ErrorFeedback;

fn draw(shape: [usize; 2], number: u64) -> Tensor<2> {
    normal_matrix(7, number, shape, &Device::default())
}

fn largest(x: Tensor<2>) -> f32 {
    x.abs().max().into_scalar()
}

/// Weights after steps with gradients `scale * draw(step)`, and the last state.
fn run<O: Optimizer>(optimizer: &O, shape: [usize; 2], steps: u64, scale: f32) -> (Tensor<2>, Option<O::State<2>>) {
    let (mut w, mut state) = (draw(shape, 0), None);
    for step in 1..=steps {
        (w, state) = optimizer.step(0.01, w, draw(shape, step) * scale, state);
    }
    (w, state)
}

fn matrix(state: &Option<ByMatrixState<2, ProjectedState>>) -> &ProjectedState {
    state.as_ref().unwrap().matrix.as_ref().unwrap()
}

#[test]
fn all_of_the_gradient_active_is_adamw_and_none_of_it_is_sign_descent() {
    let (plain, _) = run(&AdamWConfig::new().with_weight_decay(0.1).build(), [9, 6], 6, 1.0);
    for projector in [ProjectorKind::Columns, ProjectorKind::Rows, ProjectorKind::Randk, ProjectorKind::Block] {
        let config = FrugalConfig::new().with_projector(projector).with_weight_decay(0.1);
        let (all, _) = run(&config.clone().with_density(1.0).build(), [9, 6], 6, 1.0);
        assert!(largest(all - plain.clone()) < 1e-6, "{projector:?}");
        let (none, state) = run(&config.with_density(0.0).with_weight_decay(0.0).build(), [9, 6], 1, 1.0);
        let expected = draw([9, 6], 0) - draw([9, 6], 1).sign() * 0.01;
        assert!(largest(none - expected) < 1e-7, "{projector:?}");
        assert!(matrix(&state).moment_1.is_none());
    }
}

#[test]
fn galore_as_a_choice_of_frugal_is_galore() {
    let galore = GaLoreConfig::new(4).with_scale(1.0).with_epsilon(1e-8);
    let frugal = FrugalConfig::new()
        .with_rank(4)
        .with_projector(ProjectorKind::Svd)
        .with_inactive_rule(InactiveRule::No)
        .with_reset_statistics(false)
        .with_inner(Inner::AdamLegacy);
    let (a, b) = (run(&galore.build(), [12, 8], 5, 1.0).0, run(&frugal.build(), [12, 8], 5, 1.0).0);
    assert!(largest(a - b) < 1e-6);
}

#[test]
fn the_size_of_gradients_does_not_matter() {
    let shape = [12, 8];
    let none =
        |optimizer: &ByMatrix<Projected>| largest(run(optimizer, shape, 6, 1.0).0 - run(optimizer, shape, 6, 300.0).0);
    let tiny = 1e-30;
    for (name, config) in [
        ("galore", GaLoreConfig::new(4).with_epsilon(tiny).projected()),
        ("fira", FiraConfig::new(4).with_epsilon(tiny).projected()),
        ("ldadam", LdAdamConfig::new(4).with_epsilon(tiny).projected()),
        ("dct-adamw", DctAdamWConfig::new(4).with_epsilon(tiny).with_error_feedback(ErrorFeedback::Full).projected()),
    ] {
        assert!(none(&config.build()) < 1e-5, "{name}");
    }
}

#[test]
fn transposing_everything_transposes_the_result() {
    for (name, config) in [
        ("galore", GaLoreConfig::new(4).projected()),
        ("fira", FiraConfig::new(4).projected()),
        ("dct-adamw", DctAdamWConfig::new(4).with_error_feedback(ErrorFeedback::Full).projected()),
        ("apollo", ApolloConfig::new().with_rank(4).projected()),
        ("ldadam", LdAdamConfig::new(4).projected()),
    ] {
        let optimizer = config.build();
        let (mut w, mut turned) = (draw([12, 8], 0), draw([12, 8], 0).transpose());
        let (mut a, mut b) = (None, None);
        for step in 1..=5 {
            let g = draw([12, 8], step);
            // The same matrix: its random draws must be those of the other.
            let place = crate::matrix_id::MatrixId { key: 0, number: 0, count: 1 };
            (w, a) = optimizer.clone().at(place).step(0.01, w, g.clone(), a);
            (turned, b) = optimizer.clone().at(place).step(0.01, turned, g.transpose(), b);
        }
        assert!(largest(w - turned.transpose()) < 2e-6, "{name}");
    }
}

#[test]
fn the_limited_part_grows_by_no_more_than_the_limit_and_is_not_frozen_by_zeros() {
    for config in [FiraConfig::new(3).projected(), ApolloConfig::new().projected(), ApolloConfig::mini().projected()] {
        let optimizer = config.build();
        let (mut w, mut state) = (draw([12, 8], 0), None);
        let mut before: Option<f64> = None;
        for step in 1..=8 {
            let scale = if step == 5 { 0.0 } else { 3f32.powi(step) };
            (w, state) = optimizer.step(0.01, w, draw([12, 8], step as u64) * scale, state);
            let now = matrix(&state).limiter_norm.unwrap();
            if let Some(before) = before.filter(|before| *before > 1e-12) {
                assert!(now <= 1.01 * before * 1.00001, "{now} after {before}");
            }
            assert!(step != 6 || now > 1e-3, "a zero gradient freezes the matrix");
            before = Some(now);
        }
    }
}

#[test]
fn apollo_moves_along_the_gradient() {
    let g = draw([12, 8], 1);
    let (tensor, _) = run(&ApolloConfig::mini().build(), [12, 8], 1, 1.0);
    let moved = values(draw([12, 8], 0) - tensor);
    let ratios: Vec<f32> = moved.iter().zip(values(g.clone())).map(|(moved, g)| moved / g).collect();
    assert!(ratios.iter().all(|ratio| (ratio / ratios[0] - 1.0).abs() < 1e-3));
    let (channel, _) = run(&ApolloConfig::new().build(), [12, 8], 1, 1.0);
    let moved = values(draw([12, 8], 0) - channel);
    for row in 0..12 {
        let ratio = |column: usize| moved[row * 8 + column] / values(g.clone())[row * 8 + column];
        assert!(ratio(0) > 0.0 && (0..8).all(|column| (ratio(column) / ratio(0) - 1.0).abs() < 1e-3));
    }
    // Without the limit twice the scale is a step root of two as large, wherever the scale acts.
    let free = ApolloConfig::new().with_growth_limit(0.0);
    let step = |config: &ApolloConfig| run(&config.build(), [12, 8], 1, 1.0).0 - draw([12, 8], 0);
    let doubled = step(&free.clone().with_scale(2.0));
    assert!(largest(doubled.clone() - step(&free.clone()) * 2f32.sqrt()) < 1e-6);
    assert!(largest(doubled - step(&free.with_scale(2.0).with_scale_front(true))) < 1e-7);
}

#[test]
fn nothing_is_lost_in_a_full_basis() {
    for config in [
        LdAdamConfig::new(6).projected(),
        DctAdamWConfig::new(6).with_error_feedback(ErrorFeedback::Full).projected(),
        DctAdamWConfig::new(6)
            .with_error_feedback(ErrorFeedback::Full)
            .with_transform(crate::Transform::Matmul)
            .projected(),
    ] {
        let (_, state) = run(&config.build(), [9, 6], 5, 1.0);
        let error = matrix(&state).error.as_ref().unwrap().restored().unwrap();
        assert!(largest(error) < 1e-5 * largest(draw([9, 6], 5)), "{config:?}");
    }
}

#[test]
fn gradients_are_low_rank_parts_and_error_in_the_end() {
    // Without moments in the way: the sum of gradients is the sum of projected ones and the last error.
    let config = DctAdamWConfig::new(3).with_error_feedback(ErrorFeedback::Full).with_beta_1(0.0);
    let optimizer = config.build();
    let (mut w, mut state) = (draw([9, 6], 0), None);
    let (mut gradients, mut projected) = (w.zeros_like(), w.zeros_like());
    for step in 1..=6 {
        let g = draw([9, 6], step);
        (w, state) = optimizer.step(0.01, w, g.clone(), state);
        let state = matrix(&state);
        // With no decay of the first moment it is the low-rank gradient itself.
        let low = state.moment_1.clone().unwrap().restored();
        let columns = state.subspace.as_ref().unwrap().columns(6, &Device::default()).unwrap();
        projected = projected + low.matmul(columns.transpose());
        gradients = gradients + g;
    }
    let error = matrix(&state).error.as_ref().unwrap().restored().unwrap();
    assert!(largest(gradients - projected - error) < 1e-5);
}

#[test]
fn chosen_columns_keep_the_most_energy() {
    let g = draw([7, 9], 3);
    let columns = DctColumns { basis: DctBasis::Dct3, fft: false, norm: Norm::L2, weighted: false };
    let energies = values(columns.coefficients(&g, true).square().sum_dim(0));
    let place = crate::matrix_id::MatrixId { key: 0, number: 0, count: 1 };
    let renewal = Renewal { gradient: &g, right: true, rank: 4, previous: None, seed: 0, place, count: 0 };
    let chosen = columns.choose(&renewal).indices().unwrap();
    let kept: f32 = chosen.iter().map(|index| energies[*index as usize]).sum();
    // Every other choice of four of nine.
    for mask in (0u32..1 << 9).filter(|mask| mask.count_ones() == 4) {
        let other: f32 = (0..9).filter(|bit| mask & 1 << bit != 0).map(|bit| energies[bit]).sum();
        assert!(other <= kept * 1.000001);
    }
    let total: f32 = energies.iter().sum();
    assert!(total - kept <= (1.0 - 4.0 / 9.0) * total * 1.00001);
    // Ties go to the lower index.
    let zero = Renewal { gradient: &g.zeros_like(), ..renewal };
    assert_eq!(columns.choose(&zero).indices().unwrap(), [0, 1, 2, 3]);
}

#[test]
fn a_gradient_without_directions_keeps_the_subspace() {
    let place = crate::matrix_id::MatrixId { key: 0, number: 0, count: 1 };
    let g = draw([7, 9], 3);
    let first = Renewal { gradient: &g, right: true, rank: 4, previous: None, seed: 0, place, count: 0 };
    let columns = |subspace: &Subspace| values(subspace.columns(9, &Device::default()).unwrap());
    let projectors: [&dyn Projector; 2] = [&Svd, &PowerIteration];
    for projector in projectors {
        let before = projector.choose(&first);
        let failures = renewal_failures();
        for bad in [g.zeros_like(), g.clone() * f32::NAN, g.clone() * f32::INFINITY] {
            let renewal = Renewal { gradient: &bad, previous: Some(&before), count: 1, ..first };
            assert_eq!(columns(&projector.choose(&renewal)), columns(&before));
            // Without a previous subspace it starts with unit vectors.
            let renewal = Renewal { gradient: &bad, ..first };
            let unit = Tensor::<2>::eye(9, &Device::default()).slice([0..9, 0..4]);
            assert_eq!(columns(&projector.choose(&renewal)), values(unit));
        }
        // Other tests of this process count as well.
        let now = renewal_failures();
        assert!(now.zero >= failures.zero + 2 && now.not_finite >= failures.not_finite + 4);
    }
}

#[test]
fn renewals_happen_at_the_steps_of_the_method() {
    let renewals = |config: ProjectedConfig| {
        let optimizer = config.build();
        let (mut w, mut state, mut steps) = (draw([9, 6], 0), None, Vec::new());
        let mut before = 0;
        for step in 1..=8 {
            (w, state) = optimizer.step(0.01, w, draw([9, 6], step), state);
            let now = matrix(&state).renewals;
            if now > before {
                steps.push(step);
            }
            before = now;
        }
        steps
    };
    assert_eq!(renewals(GaLoreConfig::new(3).with_update_proj_gap(3).projected()), [1, 4, 7]);
    assert_eq!(renewals(DctAdamWConfig::new(3).with_update_proj_gap(3).projected()), [1, 3, 6]);
    let product = DctAdamWConfig::new(3).with_update_proj_gap(3).with_transform(crate::Transform::Matmul);
    assert_eq!(renewals(product.projected()), [1, 3, 6]);
    assert_eq!(renewals(LdAdamConfig::new(3).projected()), [1, 2, 3, 4, 5, 6, 7, 8]);
}

#[test]
fn every_matrix_has_its_turn_equally_often() {
    use crate::matrix_id::MatrixId;
    use crate::projected::config::BlockOrder;
    for (order, count) in [(BlockOrder::Descending, 5), (BlockOrder::Ascending, 6), (BlockOrder::Mirror, 8)] {
        let blocks = crate::projected::projector::ActiveMatrices { density: 0.5, order };
        let g = draw([2, 2], 0);
        let active = |number: usize, turn: u64| {
            let place = MatrixId { key: number as u64, number, count };
            let renewal = Renewal { gradient: &g, right: true, rank: 0, previous: None, seed: 0, place, count: turn };
            matches!(blocks.choose(&renewal), Subspace::Whole)
        };
        let turns = count as u64 * 2;
        let times: Vec<usize> =
            (0..count).map(|number| (0..turns).filter(|turn| active(number, *turn)).count()).collect();
        let (least, most) = (times.iter().min().unwrap(), times.iter().max().unwrap());
        assert!(most - least <= 1, "{order:?} {times:?}");
        for turn in 0..turns {
            assert_eq!((0..count).filter(|number| active(*number, turn)).count(), blocks.active(count), "{order:?}");
        }
    }
}

#[test]
fn trion_at_full_rank_is_muon_without_nesterov() {
    let trion = TrionConfig::new(6).with_scaling(Scaling::Kj).build();
    let muon = MuonConfig::new().with_momentum_rule(MomentumRule::HeavyBall).with_nesterov(false).build();
    assert!(largest(run(&trion, [9, 6], 5, 1.0).0 - run(&muon, [9, 6], 5, 1.0).0) < 1e-5);
    let ema = MuonConfig::new().build();
    let heavy = MuonConfig::new().with_momentum_rule(MomentumRule::HeavyBall).build();
    assert!(largest(run(&ema, [9, 6], 5, 1.0).0 - run(&heavy, [9, 6], 5, 1.0).0) < 1e-5);
}

#[test]
fn random_projections_keep_lengths_on_average_and_differ_by_matrix() {
    let (device, draws) = (Device::default(), 400);
    let x = draw([1, 24], 1);
    let length: f32 = x.clone().square().sum().into_scalar();
    let lengths: Vec<f64> = (0..draws)
        .map(|count| {
            let p = Subspace::Gaussian { seed: 0, key: 1, count, rank: 8 }.columns(24, &device).unwrap();
            f64::from(x.clone().matmul(p).square().sum().into_scalar::<f32>())
        })
        .collect();
    let mean = lengths.iter().sum::<f64>() / draws as f64;
    let variance = lengths.iter().map(|length| (length - mean).powi(2)).sum::<f64>() / draws as f64;
    assert!((mean - f64::from(length)).abs() < 3.0 * (variance / draws as f64).sqrt());
    let columns = |key| values(Subspace::Gaussian { seed: 0, key, count: 0, rank: 8 }.columns(24, &device).unwrap());
    assert!(columns(1) == columns(1) && columns(1) != columns(2));
}
