//! LoRA-LEGO against reference values.

use lowrank_models::adapter::compose::{Layer, Lego, Matrix};

use super::support::case::{Case, Outcome};
use super::support::compose::{layer, near};

pub fn run(case: &Case) -> Outcome {
    let layer = layer(case)?;
    if let Some(ranks) = case.config["ranks"].as_array() {
        let ours: Vec<Option<u64>> = layer.sources.iter().map(|source| Some(source.rank() as u64)).collect();
        if ranks.iter().map(serde_json::Value::as_u64).collect::<Vec<_>>() != ours {
            return Err(format!("ranks are {ours:?} instead of {ranks:?}"));
        }
    }
    let flag = |key: &str, usual: bool| case.config[key].as_bool().unwrap_or(usual);
    let lego = Lego {
        k: Some(case.count("k")?),
        parameter_reweight: flag("parameter_reweight", true),
        output_reweight: flag("output_reweight", true),
        balance_units: flag("balance_units", false),
        align_signs: flag("align_signs", false),
        max_iter: case.config["max_iter"].as_u64().map_or(300, |count| count as usize),
        ..Lego::default()
    };
    let start: Vec<usize> = case.array("init_indices")?.values.iter().map(|value| *value as usize).collect();
    let found = lego.clustered(&layer, Some(&start)).map_err(|error| error.to_string())?;
    near(case, "pool", &found.pool.transpose(), 1e-5)?;
    let expected: Vec<usize> = case.array("assignment")?.values.iter().map(|value| *value as usize).collect();
    if found.clusters.assignment != expected {
        return Err(format!("the assignment is {:?} instead of {expected:?}", found.clusters.assignment));
    }
    for (key, ours) in [("iterations", found.clusters.iterations), ("relocations", found.clusters.relocations)] {
        if ours != case.count(key)? {
            return Err(format!("{key} are {ours} instead of {}", case.count(key)?));
        }
    }
    let inertia = case.number("inertia")?;
    if (found.clusters.inertia - inertia).abs() > 1e-5 * inertia.max(1e-6) {
        return Err(format!("the inertia is {} instead of {inertia}", found.clusters.inertia));
    }
    let scale = case.number("output_scale")?;
    if (found.scale - scale).abs() > 1e-12 * scale {
        return Err(format!("the output scale is {} instead of {scale}", found.scale));
    }
    near(case, "centroid", &found.clusters.centroids.transpose(), 1e-5)?;
    near(case, "mean_member_norm", &Matrix::from_row_slice(1, found.lengths.len(), &found.lengths), 1e-5)?;
    near(case, "parameter_ratio", &Matrix::from_row_slice(1, found.ratios.len(), &found.ratios), 1e-5)?;
    near(case, "merged_A", &found.a, 1e-5)?;
    near(case, "merged_B", &found.b, 1e-5)?;
    let plain = &found.b * &found.a;
    near(case, "delta_no_output_reweight", &plain, 1e-5)?;
    let delta = plain * found.scale;
    near(case, "delta", &delta, 1e-5)?;
    near(case, "sum_of_deltas", &sum(&layer), 1e-5)?;
    let x = super::support::compose::matrix(case, "x")?;
    near(case, "y_delta", &(x * delta.transpose()), 1e-5)?;
    Ok("units, clusters, reweighted factors and outputs are equal".into())
}

fn sum(layer: &Layer) -> Matrix {
    layer.sources.iter().map(|source| source.delta() * source.weight()).sum()
}
