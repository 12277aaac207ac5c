//! Properties that the specifications of the compositions state, on layers without structure.

use serde_json::{Value, json};

use super::*;

fn wave(rows: usize, columns: usize, shift: usize) -> Matrix {
    Matrix::from_fn(rows, columns, |r, c| {
        let place = (r * columns + c) * 7919 + shift * 104_729 + 13;
        ((place % 1009) as f64 * 0.37).sin()
    })
}

fn source(number: usize, rank: usize, scale: f64) -> Source {
    Source {
        adapter: format!("adapter{number}"),
        a: wave(rank, 9, 3 * number + 1),
        b: wave(7, rank, 5 * number + 2),
        scale,
        weight: None,
        basis: None,
    }
}

fn layer(sources: Vec<Source>) -> Layer {
    Layer::new("model.layer", sources).unwrap()
}

fn three() -> Layer {
    layer(vec![source(0, 3, 2.0), source(1, 3, 1.0), source(2, 3, 0.5)])
}

fn weighted(mut of: Layer, weights: &[f64]) -> Layer {
    of.sources.iter_mut().zip(weights).for_each(|(source, weight)| source.weight = Some(*weight));
    of
}

fn options(value: Value) -> Options {
    value.as_object().cloned().unwrap()
}

fn composed(name: &str, given: Value, of: &Layer) -> Composed {
    <dyn Composition>::named(name, &options(given)).unwrap().compose(of).unwrap()
}

fn delta(name: &str, given: Value, of: &Layer) -> Matrix {
    composed(name, given, of).result.into_delta().unwrap()
}

fn refusal(name: &str, given: Value, of: &Layer) -> String {
    match <dyn Composition>::named(name, &options(given)).and_then(|method| method.compose(of)) {
        Ok(_) => panic!("{name} was composed"),
        Err(error) => error.to_string(),
    }
}

#[track_caller]
fn near(x: &Matrix, y: &Matrix, share: f64) {
    let apart = (x - y).amax();
    assert!(apart <= share * y.amax().max(1e-12), "{apart} of {}", y.amax());
}

fn sum(of: &Layer) -> Matrix {
    of.sources.iter().map(|source| source.delta() * source.weight()).sum()
}

#[test]
fn concatenation_and_untruncated_svd_are_the_exact_sum() {
    let of = weighted(three(), &[1.0, -0.7, 0.4]);
    near(&delta("cat", json!({}), &of), &sum(&of), 1e-12);
    near(&delta("svd", json!({"rank": 7}), &of), &sum(&of), 1e-12);
    near(&delta("average", json!({"space": "deltas"}), &of), &sum(&of), 1e-12);
    near(&delta("average", json!({"space": "deltas"}), &three()), &(sum(&three()) / 3.0), 1e-12);
    // The reduced route and the dense one, truncated.
    let (a, b, _) = truncated(sum(&of), 2);
    near(&delta("svd", json!({"rank": 2}), &of), &(b * a), 1e-12);
    // Weights 1 and -1 of equal adapters.
    let equal = weighted(layer(vec![source(0, 3, 2.0), source(0, 3, 2.0)]), &[1.0, -1.0]);
    for name in ["cat", "svd", "linear"] {
        assert!(delta(name, json!({}), &equal).amax() < 1e-12, "{name}");
    }
}

#[test]
fn one_adapter_of_weight_1_is_given_back() {
    let of = layer(vec![source(1, 3, 0.7)]);
    for (name, given) in [
        ("cat", json!({})),
        ("linear", json!({})),
        ("average", json!({})),
        ("svd", json!({})),
        ("ties", json!({"density": 1})),
        ("ties", json!({"density": 1, "space": "deltas"})),
        ("ties", json!({"density": 1, "space": "deltas", "convention": "weight-normalised"})),
        ("dare", json!({"density": 1})),
        ("magnitude-prune", json!({"density": 1, "space": "deltas"})),
        ("knots", json!({"scale": 1})),
    ] {
        near(&delta(name, given, &of), &sum(&of), 1e-12);
    }
}

#[test]
fn signs_are_elected_whatever_the_order() {
    let of = three();
    let turned = layer(of.sources.iter().rev().cloned().collect());
    let given = json!({"density": 0.5, "space": "deltas"});
    near(&delta("ties", given.clone(), &of), &delta("ties", given.clone(), &turned), 1e-12);
    let equal = layer(vec![source(0, 3, 1.0), source(0, 3, 1.0)]);
    near(&delta("ties", json!({"density": 1, "space": "deltas"}), &equal), &equal.sources[0].delta(), 1e-12);
    let report = composed("ties", given, &of).report;
    assert!(report["sign_conflicts"].as_f64().unwrap() > 0.0);
    assert_eq!(composed("ties", json!({"density": 1, "space": "deltas"}), &equal).report["sign_conflicts"], json!(0.0));
}

#[test]
fn updates_that_are_read_in_blocks_merge_as_whole_ones() {
    // More elements than a block; whole numbers, so that many magnitudes are equal.
    let [d_out, d_in] = [1100, 1000];
    let whole = |rows: usize, columns: usize, shift: usize| {
        Matrix::from_fn(rows, columns, |r, c| ((r * 31 + c * 17 + shift * 7) % 13) as f64 - 6.0)
    };
    let of = |number: usize| Source {
        a: whole(2, d_in, number),
        b: whole(d_out, 2, number + 3),
        scale: 0.5,
        weight: Some(1.0 + number as f64),
        ..source(number, 2, 1.0)
    };
    let layer = layer(vec![of(0), of(1), of(2)]);
    for share in [0.02, 0.3, 0.9] {
        let trimmed = layer.sources.iter().map(|source| {
            let delta = source.delta();
            let mut order: Vec<(usize, usize)> = (0..d_out).flat_map(|r| (0..d_in).map(move |c| (r, c))).collect();
            order.sort_by(|x, y| delta[*y].abs().total_cmp(&delta[*x].abs()));
            let mut kept = Matrix::zeros(d_out, d_in);
            order[..(share * (d_out * d_in) as f64).floor() as usize].iter().for_each(|at| kept[*at] = delta[*at]);
            kept
        });
        let trimmed: Vec<Matrix> = trimmed.collect();
        let summed: Matrix = trimmed.iter().zip(&layer.sources).map(|(kept, source)| kept * source.weight()).sum();
        let given = json!({"density": share, "space": "deltas"});
        near(&delta("magnitude-prune", given.clone(), &layer), &summed, 1e-12);
        let (mut elected, mut conflicts) = (Matrix::zeros(d_out, d_in), 0);
        for place in 0..elected.len() {
            let values = || trimmed.iter().map(|kept| kept[place]);
            let positive = values().sum::<f64>() >= 0.0;
            let same: Vec<f64> = (0..3)
                .filter(|i| trimmed[*i][place] != 0.0 && (trimmed[*i][place] > 0.0) == positive)
                .map(|i| trimmed[i][place] * layer.sources[i].weight())
                .collect();
            elected[place] = same.iter().sum::<f64>() / same.len().max(1) as f64;
            conflicts += usize::from(values().any(|x| x > 0.0) && values().any(|x| x < 0.0));
        }
        let ties = composed("ties", given, &layer);
        assert_eq!(ties.report["sign_conflicts"], json!(conflicts as f64 / (d_out * d_in) as f64));
        near(&ties.result.into_delta().unwrap(), &elected, 1e-12);
    }
}

#[test]
fn a_dense_update_is_truncated_to_its_leading_part_tall_or_wide() {
    for (rows, columns) in [(90, 70), (70, 90)] {
        let strong = wave(rows, 3, 1) * wave(3, columns, 2) * 10.0;
        let (a, b, left_out) = truncated(strong.clone(), 3);
        near(&(&b * &a), &strong, 1e-9);
        assert!(left_out < 1e-6 && a.row_iter().all(|row| (row.norm() - 1.0).abs() < 1e-9), "{left_out}");
        let noisy = &strong + wave(rows, columns, 5);
        let (a, b, left_out) = truncated(noisy.clone(), 3);
        let exact = noisy.clone().svd(false, false).singular_values;
        let rest = exact.iter().skip(3).map(|value| value * value).sum::<f64>().sqrt();
        assert!(((&noisy - b * a).norm() - rest).abs() < 1e-8 * rest, "{rest}");
        assert!((left_out - rest / exact.norm()).abs() < 1e-8);
    }
}

#[test]
fn random_masks_keep_the_mean_and_follow_from_the_seed() {
    let of = three();
    let draw = |seed: u64| delta("dare", json!({"density": 0.6, "space": "deltas", "seed": seed}), &of);
    assert_eq!(draw(3), draw(3));
    assert_ne!(draw(3), draw(4));
    let mean: Matrix = (0..3000).map(draw).sum::<Matrix>() / 3000.0;
    near(&mean, &sum(&of), 0.1);
    let restored = composed("dare", json!({"density": 0.6, "rescale": "l1"}), &layer(vec![source(0, 3, 1.0)]));
    let Composite::Factors { a, .. } = restored.result else { unreachable!() };
    let magnitude = |matrix: &Matrix| matrix.iter().map(|value| value.abs()).sum::<f64>();
    assert!((magnitude(&a) / magnitude(&of.sources[0].a) - 1.0).abs() < 1e-12);
}

#[test]
fn averaging_in_the_shared_basis_is_averaging() {
    // More components than outputs, and different ranks.
    for of in [three(), layer(vec![source(0, 2, 1.0), source(1, 4, -1.5)])] {
        let mean = sum(&of) / of.sources.len() as f64;
        near(&delta("knots", json!({"merge": "average"}), &of), &mean, 1e-12);
    }
}

#[test]
fn interpolation_returns_its_ends_and_equal_adapters() {
    let of = layer(vec![source(0, 3, 2.0), source(1, 2, 0.5)]);
    near(&delta("slerp", json!({"t": 0}), &of), &of.sources[0].delta(), 1e-12);
    near(&delta("slerp", json!({"t": 1}), &of), &of.sources[1].delta(), 1e-12);
    let equal = layer(vec![source(0, 3, 2.0), source(0, 3, 2.0)]);
    near(&delta("slerp", json!({"t": 0.3}), &equal), &equal.sources[0].delta(), 1e-12);
    near(
        &delta("slerp", json!({}), &weighted(of.clone(), &[3.0, 1.0])),
        &delta("slerp", json!({"t": 0.25}), &of),
        1e-12,
    );
    let error = refusal("slerp", json!({}), &weighted(of, &[0.5, -0.5]));
    assert!(error.contains("0.5 of adapter0 and -0.5 of adapter1"), "{error}");
    let error = refusal("slerp", json!({}), &three());
    assert!(error.contains("3 are given (adapter0, adapter1, adapter2)"), "{error}");
}

#[test]
fn units_alone_are_the_sum_and_copies_are_the_adapter() {
    let of = layer(vec![source(0, 3, 2.0), source(1, 2, -0.5)]);
    near(&delta("lego", json!({"k": 5, "output_reweight": false}), &of), &sum(&of), 1e-12);
    let lego = Lego { k: Some(3), ..Lego::default() };
    let copies = layer(vec![source(0, 3, 2.0), source(0, 3, 2.0)]);
    let found = lego.clustered(&copies, Some(&[0, 1, 2])).unwrap();
    near(&(found.b * found.a * found.scale), &copies.sources[0].delta(), 1e-12);
}

#[test]
fn clusters_are_as_long_as_their_members_and_turn_with_the_adapters() {
    let of = three();
    let lego = Lego { k: Some(4), ..Lego::default() };
    let found = lego.clustered(&of, Some(&[0, 3, 5, 8])).unwrap();
    assert!(found.ratios.iter().all(|ratio| *ratio >= 1.0 - 1e-9), "{:?}", found.ratios);
    for k in 0..4 {
        let length = (found.a.row(k).norm_squared() + found.b.column(k).norm_squared()).sqrt();
        assert!((length / found.lengths[k] - 1.0).abs() < 1e-12);
    }
    assert!((found.scale - (3f64 / 4.0).sqrt()).abs() < 1e-15);
    // Adapters in another order, with the same units as starts.
    let turned = layer(of.sources.iter().rev().cloned().collect());
    let again = lego.clustered(&turned, Some(&[6, 3, 5, 2])).unwrap();
    near(&(again.b * again.a), &(&found.b * &found.a), 1e-9);
    // All scales times a number.
    let mut doubled = of.clone();
    doubled.sources.iter_mut().for_each(|source| source.scale *= 2.5);
    let again = lego.clustered(&doubled, Some(&[0, 3, 5, 8])).unwrap();
    assert_eq!(again.clusters.assignment, found.clusters.assignment);
    near(&(again.b * again.a), &(&found.b * &found.a * 2.5), 1e-9);
    // The same seed gives the same bits.
    assert_eq!(delta("lego", json!({}), &of), delta("lego", json!({}), &of));
    let error = refusal("lego", json!({"k": 10}), &of);
    assert!(error.contains("k = 10") && error.contains("9 units"), "{error}");
}

fn pool(p: Value, of: &Layer) -> PoolLayer {
    match composed("rmm", p, of).result {
        Composite::Pool(pool) => *pool,
        _ => unreachable!(),
    }
}

fn squared(of: &Layer, pool: &PoolLayer) -> f64 {
    let apart = of.sources.iter().enumerate().map(|(number, source)| {
        let (a, b, _) = pool.revert(number);
        (a - &source.a).norm_squared() + (b - &source.b).norm_squared()
    });
    apart.sum()
}

#[test]
fn a_full_pool_gives_every_adapter_back_and_its_residual_falls_with_p() {
    for of in [three(), layer((0..5).map(|number| source(number, 2, 1.0)).collect())] {
        let most = of.sources[0].rank().min(of.sources.len() - 1);
        let mut last = f64::INFINITY;
        for p in 0..=most {
            let pool = pool(json!({"p": p}), &of);
            let lost = squared(&of, &pool);
            assert!(lost <= last + 1e-12);
            last = lost;
            let (n, r, sides) = (of.sources.len(), of.sources[0].rank(), 16);
            assert_eq!(pool.values(), sides * (p * (r + n) + r) + n);
            // The mean of the rebuilt adapters is that of the sources.
            let mean = |of: &dyn Fn(usize) -> Matrix| (0..n).map(of).sum::<Matrix>();
            near(&mean(&|i| pool.revert(i).0), &mean(&|i| of.sources[i].a.clone()), 1e-12);
            let report = composed("rmm", json!({"p": p}), &of).report;
            let all = squared(&of, &self::pool(json!({"p": 0}), &of));
            assert!((report["residual"].as_f64().unwrap() - (lost / all).sqrt()).abs() < 1e-9);
        }
        assert!(last < 1e-24, "{last}");
    }
}

#[test]
fn a_common_part_changes_the_mean_alone_and_a_new_task_keeps_the_others() {
    let of = layer((0..5).map(|number| source(number, 3, 1.0)).collect());
    let mut moved = of.clone();
    let (a, b) = (wave(3, 9, 77), wave(7, 3, 78));
    moved.sources.iter_mut().for_each(|source| (source.a, source.b) = (&source.a + &a, &source.b + &b));
    let (before, mut after) = (pool(json!({"p": 1}), &of), pool(json!({"p": 1}), &moved));
    near(&after.a.mean, &(&before.a.mean + a), 1e-12);
    near(&after.revert(2).0, &(before.revert(2).0 + wave(3, 9, 77)), 1e-9);
    let kept: Vec<_> = (0..5).map(|number| after.revert(number)).collect();
    // A source that the pool holds exactly, and one that it does not.
    let (a, b, scale) = after.revert(1);
    let known = Source { a, b, scale, ..source(9, 3, 1.0) };
    assert!(after.add(&known).unwrap() < 1e-9);
    assert!(after.add(&source(10, 3, 1.0)).unwrap() > 0.1);
    assert_eq!((0..5).map(|number| after.revert(number)).collect::<Vec<_>>(), kept);
    assert_eq!(after.sources(), 7);
    near(&after.revert(5).0, &known.a, 1e-9);
    assert!(after.add(&source(0, 2, 1.0)).unwrap_err().contains("rank 3"));
}

#[test]
fn the_directions_are_the_best_of_their_number() {
    let of = layer((0..5).map(|number| source(number, 3, 1.0)).collect());
    let pool = pool(json!({"p": 1}), &of);
    let rebuilt: f64 = squared(&of, &pool);
    for shift in 0..20 {
        let lost: f64 = (0..9)
            .map(|position| {
                let direction = wave(3, 1, 500 + 10 * shift + position).normalize();
                let deviations =
                    of.sources.iter().map(|source| source.a.column(position) - pool.a.mean.column(position));
                deviations.map(|x| x.norm_squared() - (direction.transpose() * &x).norm_squared()).sum::<f64>()
            })
            .sum();
        let ours: f64 =
            of.sources.iter().enumerate().map(|(i, source)| (pool.revert(i).0 - &source.a).norm_squared()).sum();
        assert!(ours <= lost, "{ours} {lost}");
    }
    assert!(rebuilt > 0.0);
}

#[test]
fn p_follows_from_a_budget_or_a_residual_and_alignment_keeps_the_updates() {
    let of = layer((0..5).map(|number| source(number, 3, 1.0)).collect());
    let size = |of: &Layer| LayerSize { shape: of.shape(), ranks: of.sources.iter().map(Source::rank).collect() };
    for (budget, p) in
        [(4 * (16 * 3 + 5), 0), (4 * (16 * (8 + 3) + 5), 1), (4 * (16 * (16 + 3) + 5) - 1, 1), (1 << 20, 3)]
    {
        let mut rmm = Rmm { budget: Some(budget), ..Rmm::default() };
        rmm.plan(&[size(&of)]).unwrap();
        let Composite::Pool(pool) = rmm.compose(&of).unwrap().result else { unreachable!() };
        assert_eq!(pool.directions(), p, "{budget}");
    }
    let error = Rmm { budget: Some(8), ..Rmm::default() }.plan(&[size(&of)]).unwrap_err().to_string();
    assert!(error.contains("budget = 8") && error.contains("212 bytes"), "{error}");
    let all = squared(&of, &pool(json!({"p": 0}), &of));
    let chosen = pool(json!({"residual": 0.4}), &of);
    assert!(squared(&of, &chosen) <= 0.4 * all);
    assert!(squared(&of, &pool(json!({"p": chosen.directions() - 1}), &of)) > 0.4 * all);
    let full = pool(json!({"p": 3, "align": true}), &of);
    for (number, source) in of.sources.iter().enumerate() {
        let (a, b, scale) = full.revert(number);
        near(&(b * a * scale), &source.delta(), 1e-9);
    }
    // Adapters that differ by a rotation of their factors are one adapter.
    let mut turned = of.clone();
    let rotation = wave(3, 3, 9).qr().q();
    turned.sources.truncate(2);
    turned.sources[1].a = rotation.transpose() * &turned.sources[0].a;
    turned.sources[1].b = &turned.sources[0].b * rotation;
    let mean = pool(json!({"p": 0, "align": true}), &turned);
    let (a, b, _) = mean.revert(1);
    near(&(b * a), &turned.sources[0].delta(), 1e-9);
    let error = refusal("rmm", json!({"p": 4}), &of);
    assert!(error.contains("p = 4") && error.contains("at most 3") && error.contains("clamp"), "{error}");
    assert_eq!(pool(json!({"p": 4, "clamp": true}), &of).directions(), 3);
}

#[test]
fn sums_of_disjoint_vectors_do_not_meet() {
    use crate::{Basis, BasisKind};
    let basis = Basis::seeded(BasisKind::Dct, 0, 9);
    let of = |number: usize, indices: [usize; 2]| {
        let rows = Matrix::from_fn(2, 9, |r, c| f64::from(basis.row(indices[r])[c]));
        Source { a: rows, b: wave(7, 2, number), ..source(number, 2, 1.0) }
    };
    let given = json!({"basis": "dct", "lambda": 1});
    let disjoint = layer(vec![of(0, [1, 4]), of(1, [7, 2])]);
    let report = composed("orthogonal-sum", given.clone(), &disjoint).report;
    assert!(report["crosstalk"].as_f64().unwrap() < 1e-6 && report["overlap"].as_f64().unwrap() < 1e-6, "{report:?}");
    near(&delta("orthogonal-sum", given.clone(), &disjoint), &sum(&disjoint), 1e-12);
    let report = composed("orthogonal-sum", given.clone(), &layer(vec![of(0, [1, 4]), of(1, [4, 1])])).report;
    assert!((report["overlap"].as_f64().unwrap() - 1.0).abs() < 1e-6, "{report:?}");
    let error = refusal("orthogonal-sum", given.clone(), &three());
    assert!(error.contains("adapter0") && error.contains("row 0 of A is no vector of the basis"), "{error}");
    let named = |name: &str| Source { basis: Some(name.into()), ..of(2, [3, 5]) };
    let error = refusal("orthogonal-sum", given, &layer(vec![of(0, [1, 4]), named("dct of basis_seed 5")]));
    assert!(error.contains("dct of basis_seed 5") && error.contains("adapter2"), "{error}");
}

#[test]
fn sources_that_do_not_fit_are_refused_with_adapter_layer_and_numbers() {
    let new = |sources: Vec<Source>| Layer::new("model.layer", sources).map(|_| ()).unwrap_err().to_string();
    let mut wide = source(1, 3, 1.0);
    wide.a = wave(3, 8, 1);
    let error = new(vec![source(0, 3, 1.0), wide]);
    assert!(error.contains("adapter1, layer model.layer: has 8 inputs and 7 outputs, adapter0 has 9 and 7"), "{error}");
    let mut damaged = source(1, 3, 1.0);
    damaged.b[(2, 1)] = f64::NAN;
    let error = new(vec![source(0, 3, 1.0), damaged]);
    assert!(error.contains("adapter1") && error.contains("B[2, 1] is NaN"), "{error}");
    assert!(new(Vec::new()).contains("no source"));
    let error = new(vec![Source { weight: Some(f64::INFINITY), ..source(0, 3, 1.0) }]);
    assert!(error.contains("weight is inf"), "{error}");
    let mixed = layer(vec![source(0, 3, 1.0), source(1, 2, 1.0)]);
    for (name, given) in [
        ("linear", json!({})),
        ("average", json!({})),
        ("ties", json!({"density": 0.5})),
        ("dare", json!({"density": 0.5})),
        ("magnitude-prune", json!({"density": 0.5})),
        ("rmm", json!({"p": 1})),
    ] {
        let error = refusal(name, given, &mixed);
        assert!(error.contains("adapter1, layer model.layer: has rank 2, adapter0 has rank 3"), "{name}: {error}");
    }
    let error = refusal("svd", json!({"rank": 8}), &three());
    assert!(error.contains("rank = 8") && error.contains("at most 7"), "{error}");
    let error = <dyn Composition>::named("ties", &Options::new()).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("density is not given"), "{error}");
    let error = <dyn Composition>::named("tise", &Options::new()).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("did you mean \"ties\"?"), "{error}");
}
