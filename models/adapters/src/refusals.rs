//! Rejections by the structures' specifications, each with the numbers and words that the message must contain.

use serde_json::{Value, json};

use crate::bench::Bench;
use crate::{AdapterConfig, Alpha, Rank, STRUCTURES, Scaling, StructureEntry};

/// Parts missing from an error message, if any.
fn lacking(config: &AdapterConfig, shape: [usize; 2], parts: &[&str]) -> Option<String> {
    let error = match Bench::fresh(config, shape) {
        Ok(_) => return Some(format!("{config:?} is taken")),
        Err(error) => error,
    };
    let missing: Vec<&&str> = parts.iter().filter(|part| !error.contains(**part)).collect();
    (!missing.is_empty()).then(|| format!("{missing:?} is not in: {error}"))
}

#[track_caller]
fn refused(config: &AdapterConfig, shape: [usize; 2], parts: &[&str]) {
    assert_eq!(lacking(config, shape, parts), None);
}

/// Configuration of a structure with options and a rank, 0 for its default.
fn with(structure: &str, rank: usize, options: Value) -> AdapterConfig {
    let Value::Object(options) = options else { unreachable!("options are an object") };
    AdapterConfig { options, rank: (rank > 0).then_some(rank), ..AdapterConfig::new(structure) }
}

#[test]
fn ranks_scales_and_dropout_outside_their_ranges_are_refused_for_every_structure() {
    for StructureEntry { spec, .. } in STRUCTURES {
        let config = AdapterConfig::new(spec.name);
        let shape = [64, 64];
        match spec.rank {
            Rank::None => refused(&config.clone().with_rank(4), shape, &["rank = 4", spec.name, "has no rank"]),
            _ => refused(&config.clone().with_rank(0), shape, &["rank = 0", spec.name, "at least 1"]),
        }
        for alpha in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            let reason = if spec.alpha == Alpha::None { "has no alpha" } else { "above 0" };
            refused(&config.clone().with_alpha(alpha), shape, &[&format!("alpha = {alpha}"), spec.name, reason]);
        }
        for dropout in [-0.1, 1.0, f64::NAN] {
            let config = AdapterConfig { dropout, ..config.clone() };
            refused(&config, shape, &[&format!("dropout = {dropout}"), spec.name, "from 0 to below 1"]);
        }
        if !spec.dropout {
            let config = AdapterConfig { dropout: 0.1, ..config.clone() };
            refused(&config, shape, &["dropout = 0.1", spec.name, "has no dropout"]);
        }
        if spec.alpha == Alpha::None {
            let config = AdapterConfig { scaling: Some(Scaling::RootRank), ..config.clone() };
            refused(&config, shape, &["scaling", spec.name, "has no scale"]);
        }
        let config = AdapterConfig { init: "half".into(), ..config };
        refused(&config, shape, &["init = half", spec.name, "knows default"]);
        refused(&with(spec.name, 0, json!({"no_such": 3})), shape, &["options.no_such", spec.name, "no such option"]);
    }
}

#[test]
fn what_a_specification_refuses_is_refused_with_the_number_and_the_reason() {
    let tera = |outs: &[usize], ins: &[usize], ranks: &[usize]| {
        with("tera", 0, json!({"out_modes": outs, "in_modes": ins, "ranks": ranks}))
    };
    let cases: Vec<(AdapterConfig, [usize; 2], &[&str])> = vec![
        // Based on the decomposition of the weight.
        (with("svfit", 8, json!({})), [9, 7], &["rank 8", "smaller side, 7"]),
        (with("svfit", 0, json!({"energy": 0.0})), [9, 7], &["energy = 0", "greater than 0 and at most 1"]),
        (with("svfit", 0, json!({"energy": 1.5})), [9, 7], &["energy = 1.5", "greater than 0 and at most 1"]),
        (with("svfit", 3, json!({"energy": 0.5})), [9, 7], &["energy = 0.5", "rank 3", "take"]),
        (with("sorsa", 8, json!({})), [9, 7], &["rank 8", "smaller side, 7"]),
        (with("sorsa", 3, json!({"gamma": -1.0})), [9, 7], &["gamma = -1", "at least 0"]),
        (with("salt", 2, json!({"top_k": 0})), [9, 7], &["top_k = 0", "1 to 7"]),
        (with("salt", 2, json!({"top_k": 8})), [9, 7], &["top_k = 8", "1 to 7"]),
        (with("salt", 5, json!({"top_k": 3})), [9, 7], &["rank 5", "4"]),
        (with("salt", 2, json!({"ratio": -0.1})), [9, 7], &["ratio = -0.1", "from 0 to 1"]),
        (with("salt", 2, json!({"ratio": 1.5})), [9, 7], &["ratio = 1.5", "from 0 to 1"]),
        (with("salt", 2, json!({"ratio": 0.5, "top_k": 3})), [9, 7], &["ratio", "top_k", "one of them"]),
        (with("salt", 2, json!({"relu": "all"})), [9, 7], &["relu", "all"]),
        (with("salt", 2, json!({"init": "half"})), [9, 7], &["options.init", "no such option"]),
        (with("salt", 2, json!({"reg_multiplier": -1.0})), [9, 7], &["reg_multiplier = -1", "at least 0"]),
        (with("loldu", 8, json!({})), [9, 7], &["rank 8", "smaller side, 7"]),
        (with("loldu", 2, json!({"z_init": "half"})), [9, 7], &["z_init", "half"]),
        // Based on random or fixed bases.
        (with("randlora", 2, json!({"sparse": true, "very_sparse": true})), [8, 8], &["very_sparse", "choose one"]),
        (with("randlora", 2, json!({"sparse": true, "dist": "normal"})), [8, 8], &["normal", "no meaning"]),
        (with("randlora", 2, json!({"dist": "even"})), [8, 8], &["dist", "even"]),
        (with("nola", 7, json!({})), [40, 6], &["rank 7", "smaller side, 6"]),
        (with("nola", 2, json!({"num_basis_a": 0})), [8, 8], &["num_basis_a = 0", "at least 1"]),
        (with("nola", 2, json!({"num_basis_b": 0})), [8, 8], &["num_basis_b = 0", "at least 1"]),
        (with("nola", 2, json!({"variant": "audio"})), [8, 8], &["variant", "audio"]),
        (tera(&[4, 4], &[], &[]), [12, 20], &["[4, 4]", "16", "20"]),
        (tera(&[], &[5, 2], &[]), [12, 20], &["[5, 2]", "10", "12"]),
        (tera(&[0, 4], &[], &[]), [12, 20], &["[0, 4]", "0", "20"]),
        (tera(&[4, 5], &[3, 4], &[4, 5, 3]), [12, 20], &["3 ranks", "[4, 5, 3, 4]"]),
        (tera(&[4, 5], &[3, 4], &[4, 5, 3, 5]), [12, 20], &["rank 5 of a mode of 4", "from 1 to the size"]),
        (tera(&[4, 5], &[3, 4], &[4, 0, 3, 4]), [12, 20], &["rank 0 of a mode of 5", "from 1 to the size"]),
        (with("tera", 0, json!({"scale": 0.0})), [12, 20], &["scale = 0", "other than 0"]),
        (with("tera", 0, json!({"d_start": 0.0})), [12, 20], &["d_start = 0", "no vector has a gradient"]),
        (with("tera", 0, json!({"zero_mode": 4})), [12, 20], &["zero_mode = 4", "[4, 5, 3, 4]"]),
        (with("loca", 0, json!({"n_components": 0})), [6, 9], &["n_components = 0", "at least 1"]),
        (with("loca", 0, json!({"n_components": 55})), [6, 9], &["n_components = 55", "1 to 54"]),
        (with("loca", 0, json!({"n_components": 5, "scale": 0.0})), [6, 9], &["scale = 0", "other than 0"]),
        (with("loca", 0, json!({"n_components": 5, "coef_steps": 0})), [6, 9], &["coef_steps = 0", "at least 1"]),
        (
            with("loca", 0, json!({"n_components": 5, "learn_location_iters": -1.0})),
            [6, 9],
            &["learn_location_iters = -1", "whole number of steps"],
        ),
        (
            with("loca", 0, json!({"n_components": 5, "learn_location_iters": 1.5})),
            [6, 9],
            &["learn_location_iters = 1.5", "share below 1"],
        ),
        (
            with("loca", 0, json!({"n_components": 5, "loc_lr_scale": 0.0})),
            [6, 9],
            &["loc_lr_scale = 0", "greater than 0"],
        ),
        (with("wara", 5, json!({})), [8, 12], &["rank 5", "half of the smaller side, 4"]),
        (with("wara", 2, json!({})), [9, 12], &["[9, 12]", "odd"]),
        (with("wara", 2, json!({})), [12, 9], &["[12, 9]", "odd"]),
        (with("wara", 2, json!({"levels": 2})), [8, 12], &["levels = 2", "must be 1"]),
        (with("wara", 2, json!({"wavelet": "db3"})), [8, 12], &["wavelet", "db3"]),
        (with("wara", 1, json!({"wavelet": "db2"})), [2, 12], &["4 values", "smaller side, 2"]),
        (with("orthogonal", 9, json!({})), [8, 12], &["rank 9", "number of inputs, 8"]),
        (with("orthogonal", 2, json!({"basis": "hadamard"})), [8, 12], &["basis", "hadamard"]),
        (with("orthogonal", 2, json!({"concept": "cat"})), [8, 12], &["concept = cat", "set registry"]),
        (with("orthogonal", 2, json!({"registry": "used.json"})), [8, 12], &["registry = used.json", "set concept"]),
        // Other products.
        (with("bone", 8, json!({})), [20, 12], &["rank 8", "[20, 12]", "divide both"]),
        (with("bone", 8, json!({"mode": "block_affine_in"})), [20, 12], &["rank 8", "[20, 12]", "divide both"]),
        (with("bone", 21, json!({"mode": "shared"})), [20, 12], &["rank 21", "[20, 12]", "larger than d_in"]),
        (with("bone", 4, json!({"mode": "bat"})), [20, 12], &["mode", "bat"]),
        (
            with("bone", 4, json!({"mode": "shared_mini", "mini_r": 5})),
            [20, 12],
            &["mini_r 5", "[20, 12]", "does not divide d_out"],
        ),
        (
            with("bone", 4, json!({"mode": "shared_mini", "mini_r": 0})),
            [20, 12],
            &["mini_r 0", "does not divide d_out"],
        ),
        (with("bone", 4, json!({"mode": "shared", "mini_r": 6})), [20, 12], &["mini_r", "shared_mini"]),
        (AdapterConfig { dropout: 0.1, ..with("bone", 4, json!({})) }, [20, 12], &["dropout 0.1", "shared modes"]),
        (with("hydra", 0, json!({"rank_parallel": 0, "rank_sequential": 0})), [10, 7], &["both 0", "give one"]),
        (with("hydra", 0, json!({"rank_parallel": -1})), [10, 7], &["rank_parallel = -1"]),
        (with("hydra", 0, json!({"rank_sequential": -1})), [10, 7], &["rank_sequential = -1"]),
        (with("hydra", 0, json!({"scale": 0.0})), [10, 7], &["scale = 0", "not 0"]),
        (with("tlora", 2, json!({"in_dims": [4, 4]})), [12, 20], &["[4, 4]", "16 instead of 12"]),
        (with("tlora", 2, json!({"out_dims": [4, 4]})), [12, 20], &["[4, 4]", "16 instead of 20"]),
        (with("tlora", 2, json!({"transform_rank": 0})), [12, 20], &["transform_rank = 0", "at least 1"]),
        (with("tlora", 2, json!({"residual": "cp"})), [12, 20], &["residual", "cp"]),
        (with("tlora", 2, json!({"reg_weight": -0.5})), [12, 20], &["reg_weight = -0.5", "at least 0"]),
        (with("tlora", 2, json!({"init_noise": -0.5})), [12, 20], &["init_noise = -0.5", "at least 0"]),
        (with("tlora", 2, json!({})).with_alpha(5.0), [12, 20], &["alpha = 5", "not scaled"]),
        (with("block-lora", 8, json!({"blocks": 0})), [16, 16], &["blocks = 0", "at least 1"]),
        (with("block-lora", 8, json!({"blocks": 3})), [16, 16], &["3 blocks", "rank 8"]),
        (with("snell", 7, json!({})), [9, 7], &["2 heads", "rank 7"]),
        (with("snell", 8, json!({"heads": 0})), [9, 7], &["heads = 0", "at least 1"]),
        (with("snell", 8, json!({"coef": 0.0})), [9, 7], &["coef = 0", "other than 0"]),
        (with("snell", 8, json!({"sparsity": 1.0})), [9, 7], &["sparsity = 1", "below 1"]),
        (with("snell", 8, json!({"mode": "soft"})), [9, 7], &["mode", "soft"]),
        (with("snell", 8, json!({})).with_alpha(2.0), [9, 7], &["alpha = 2", "has no alpha"]),
        (with("bayesian-lora", 4, json!({"max_bits": 6})), [9, 7], &["max_bits = 6", "4, 8, 16 or 32"]),
        (with("bayesian-lora", 4, json!({"dead_logit": 0.5})), [9, 7], &["dead_logit = 0.5", "below 0"]),
        (with("bayesian-lora", 4, json!({"mu_q": -1.0})), [9, 7], &["mu_q = -1", "from 0"]),
        (with("bayesian-lora", 4, json!({"test_threshold": 1.0})), [9, 7], &["test_threshold = 1", "below 1"]),
        (with("bayesian-lora", 4, json!({"mode": "bits"})), [9, 7], &["mode", "bits"]),
        (AdapterConfig { alpha: Some(0.0), ..with("block-lora", 8, json!({})) }, [16, 16], &["alpha = 0", "above 0"]),
        (with("lokr", 2, json!({"decompose_factor": 0})), [16, 16], &["decompose_factor = 0", "at least 1"]),
        (with("lokr", 2, json!({"decompose_factor": -2})), [16, 16], &["decompose_factor = -2", "at least -1"]),
        (with("oft", 0, json!({"oft_block_size": 1})), [16, 16], &["oft_block_size = 1", "at least 2"]),
        (with("oft", 0, json!({"blocks": 16})), [16, 20], &["[16, 20]", "larger blocks"]),
        (with("oft", 0, json!({"eps": 0.0})), [16, 20], &["eps = 0", "greater than 0"]),
        (with("ia3", 0, json!({"feedforward_modules": "("})), [16, 20], &["feedforward_modules = (", "expression"]),
        (with("shira", 8, json!({})), [12, 20], &["rank 8", "256 positions", "240"]),
        (with("fourierft", 241, json!({})), [12, 20], &["rank 241", "240 coefficients"]),
        (with("fourierft", 4, json!({"scaling": 0.0})), [12, 20], &["scaling = 0", "other than 0"]),
        (with("pego", 4, json!({"adapters": 0})), [12, 20], &["adapters = 0", "from 1"]),
        (with("pego", 4, json!({"lambda": -1.0})), [12, 20], &["lambda = -1", "from 0"]),
        (with("pego", 13, json!({})), [12, 20], &["rank 13", "smaller side, 12"]),
        (with("gated", 4, json!({"gate_lr_scale": 0.0})), [12, 20], &["gate_lr_scale = 0", "greater than 0"]),
        (with("nested", 4, json!({"strict": true, "update": "all"})), [12, 20], &["strict = true", "frozen"]),
        (
            AdapterConfig { scaling: Some(Scaling::RootRank), ..with("nested", 4, json!({})) },
            [12, 20],
            &["adapter.scaling", "set it to rank"],
        ),
        (
            AdapterConfig { scaling: Some(Scaling::RootRank), ..with("triplet", 4, json!({})) },
            [12, 20],
            &["adapter.scaling", "set it to rank"],
        ),
    ];
    let lacking: Vec<String> =
        cases.iter().filter_map(|(config, shape, parts)| lacking(config, *shape, parts)).collect();
    assert!(lacking.is_empty(), "{}", lacking.join("\n"));
    let without: Vec<&str> = ["lora", "allora", "diffora", "dora", "vera", "lora-xs", "loha", "hira"].to_vec();
    for StructureEntry { spec, .. } in STRUCTURES.iter().filter(|entry| !without.contains(&entry.spec.name)) {
        assert!(cases.iter().any(|(config, ..)| config.structure == spec.name), "{} refuses nothing", spec.name);
    }
}
