//! Merging of adapters as peers offer it, against reference values.

use lowrank_models::adapter::compose::{Composite, Dare, DareMerge, Layer, Matrix, Space};
use serde_json::json;

use super::support::case::{Case, Outcome};
use super::support::compose::{count, delta, layer, matrix, method, near, optional};

/// Tensors of inputs; all others are results.
const INPUTS: [&str; 2] = ["adapter", "dare.mask"];

pub fn run(case: &Case) -> Outcome {
    let all = layer(case)?;
    let plain = without_weights(&all);
    let density = case.number("density")?;
    let fail = |error: lowrank_models::adapter::compose::ComposeError| error.to_string();
    let ties = |more: serde_json::Value, of: &Layer| {
        let mut given = json!({"density": density, "space": "deltas"});
        if let (Some(given), Some(more)) = (given.as_object_mut(), more.as_object()) {
            given.extend(more.clone());
        }
        delta("ties", given, of)
    };
    let mut compared = 0;
    for name in case.names() {
        let near = |ours: &Matrix, share: f64| near(case, &name, ours, share);
        let factor = |method_name: &str, options, of_a: bool| -> Result<Matrix, String> {
            match method(method_name, options)?.compose(&all).map_err(fail)?.result {
                Composite::Factors { a, b } => Ok(if of_a { a } else { b }),
                _ => Err(format!("{method_name} made no factors")),
            }
        };
        match name.as_str() {
            "cat.A" | "linear.A" => near(&factor(name.trim_end_matches(".A"), json!({}), true)?, 1e-5)?,
            "cat.B" | "linear.B" => near(&factor(name.trim_end_matches(".B"), json!({}), false)?, 1e-5)?,
            "cat.delta" | "linear.delta" => near(&delta(name.trim_end_matches(".delta"), json!({}), &all)?, 1e-5)?,
            "ties_factor.A" => near(&factor("ties", json!({"density": density}), true)?, 1e-5)?,
            "ties_factor.B" => near(&factor("ties", json!({"density": density}), false)?, 1e-5)?,
            "svd.delta" => near(&delta("svd", json!({"rank": case.count("svd_rank")?}), &all)?, 1e-5)?,
            "svd.singular_values" => near(&singular_values(case, &all)?, 1e-5)?,
            "ties_delta.count" => near(&ties(json!({}), &all)?, 1e-5)?,
            "ties_delta.frequency" => near(&ties(json!({"election": "frequency"}), &all)?, 1e-5)?,
            "ties_delta.weight_normalised" => near(&ties(json!({"convention": "weight-normalised"}), &all)?, 1e-5)?,
            "ties_svd.delta" => {
                let given = json!({"density": density, "space": "deltas", "rank": case.count("svd_rank")?});
                let composed = method("ties", given)?.compose(&all).map_err(fail)?;
                let (factors, _) = composed.result.into_factors().ok_or("ties made a pool")?;
                let product = super::support::case::host(factors.product().transpose());
                near(
                    &Matrix::from_row_iterator(all.shape()[1], all.shape()[0], product.into_iter().map(f64::from)),
                    1e-5,
                )?;
            }
            "dare_linear.delta" => near(&dare(case, &all, DareMerge::Linear, density)?, 1e-5)?,
            "dare_ties.delta" => near(&dare(case, &all, DareMerge::Ties, density)?, 1e-5)?,
            "magnitude_prune.delta" => {
                near(&delta("magnitude-prune", json!({"density": density, "space": "deltas"}), &all)?, 1e-5)?;
            }
            // Interpolation and the shared basis take the updates without weights.
            "knots_ties.delta" => {
                let given = json!({"density": density, "scale": case.number("knots_scale")?});
                near(&delta("knots", given, &plain)?, 2e-5)?;
            }
            "knots_ties_dense.delta" => {
                near(&delta("knots", json!({"density": 1, "scale": case.number("knots_scale")?}), &plain)?, 2e-5)?;
            }
            "slerp01.delta" => {
                let pair = Layer { sources: plain.sources[..2].to_vec(), ..plain.clone() };
                near(&delta("slerp", json!({"t": optional(case, "slerp_t")}), &pair)?, 1e-5)?;
            }
            "average.delta" => near(&delta("average", json!({"space": "deltas"}), &plain)?, 1e-5)?,
            name if name.starts_with("adapter") && name.ends_with(".delta") => {
                let number: usize = name[7..name.len() - 6].parse().map_err(|_| format!("{name} has no number"))?;
                near(&all.sources.get(number).ok_or("no such adapter")?.delta(), 1e-5)?;
            }
            name if INPUTS.iter().any(|input| name.starts_with(input)) => continue,
            name => return Err(format!("{name} is of no known kind")),
        }
        compared += 1;
    }
    if compared == 0 {
        return Err("has nothing to compare".into());
    }
    Ok(format!("{compared} merged tensors are equal"))
}

fn without_weights(layer: &Layer) -> Layer {
    let mut plain = layer.clone();
    plain.sources.iter_mut().for_each(|source| source.weight = None);
    plain
}

/// All singular values of the weighted sum, from `svd` of full rank: the lengths of the columns of B.
fn singular_values(case: &Case, layer: &Layer) -> Result<Matrix, String> {
    let [d_in, d_out] = layer.shape();
    let most = d_in.min(d_out);
    let composed = method("svd", json!({"rank": most}))?.compose(layer).map_err(|error| error.to_string())?;
    let Composite::Factors { b, .. } = composed.result else { return Err("svd made no factors".into()) };
    let mut values: Vec<f64> = b.column_iter().map(|column| column.norm()).collect();
    // A sum of smaller rank has zeros for the others.
    values.resize(case.array("svd.singular_values")?.values.len(), 0.0);
    Ok(Matrix::from_row_slice(1, values.len(), &values))
}

fn dare(case: &Case, layer: &Layer, merge: DareMerge, density: f64) -> Result<Matrix, String> {
    let given = count(case, "dare.mask", "");
    if given != layer.sources.len() {
        return Err(format!("{given} masks for {} adapters", layer.sources.len()));
    }
    let masks: Result<Vec<Vec<bool>>, String> = (0..given)
        .map(|number| {
            let mask = matrix(case, &format!("dare.mask{number}"))?;
            Ok(mask.transpose().iter().map(|value| *value != 0.0).collect())
        })
        .collect();
    let masks = masks?;
    let dare = Dare { merge, space: Space::Deltas, density, ..Dare::default() };
    let composed = dare.masked(layer, |source, _| masks[source].iter().copied()).map_err(|error| error.to_string())?;
    composed.result.into_delta().ok_or_else(|| "dare made no update".into())
}
