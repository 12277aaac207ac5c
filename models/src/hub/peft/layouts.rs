//! Table of the structures that `peft` supports.

use burn::tensor::{Device, Tensor, TensorData};
use serde_json::{Value, json};

use super::keys::Keys;
use super::layout::{Folded, Layout};
use lowrank_adapters::{AdapterConfig, AdapterOptions, GivenTensors, Targets};

/// All of them.
static LAYOUTS: &[Layout] = &[LORA, DORA, ADALORA, VERA, RANDLORA, BONE, LOHA, LOKR, OFT, IA3, HIRA, SHIRA, FOURIERFT];

const LORA: Layout = Layout {
    structure: "lora",
    types: &["LORA"],
    tensors: &[("a", "lora_A.weight"), ("b", "lora_B.weight")],
    embedding: &[("a", "lora_embedding_A"), ("b", "lora_embedding_B")],
    shared: &[],
    whole: &[],
    rank: Some(("r", 8)),
    ranks: Some("rank_pattern"),
    alpha: Some(("lora_alpha", 8.0)),
    alphas: Some("alpha_pattern"),
    stabilised: true,
    dropout: Some("lora_dropout"),
    init: "init_lora_weights",
    seed: None,
    bias: Some("lora_only"),
    targets: &["q_proj", "v_proj"],
    lacks: &[],
    training: &[],
    read: |_| Ok(AdapterOptions::new()),
    write: |_| Ok(vec![("use_dora", json!(false)), ("fan_in_fan_out", json!(false)), ("lora_bias", json!(false))]),
    folded: None,
};

const DORA: Layout = Layout {
    structure: "dora",
    tensors: &[("a", "lora_A.weight"), ("b", "lora_B.weight"), ("magnitude", "lora_magnitude_vector")],
    embedding: &[],
    write: |_| Ok(vec![("use_dora", json!(true)), ("fan_in_fan_out", json!(false)), ("lora_bias", json!(false))]),
    ..LORA
};

/// Properties that most types have in common.
const PLAIN: Layout = Layout {
    embedding: &[],
    ranks: None,
    alpha: None,
    alphas: None,
    stabilised: false,
    init: "init_weights",
    write: |_| Ok(Vec::new()),
    ..LORA
};

/// Singular values between the factors, with the masks of the ranks applied: plain LoRA whose factor A holds them.
const ADALORA: Layout = Layout {
    types: &["ADALORA"],
    tensors: &[("a", "lora_A"), ("b", "lora_B"), ("e", "lora_E")],
    rank: Some(("init_r", 12)),
    alpha: Some(("lora_alpha", 8.0)),
    dropout: Some("lora_dropout"),
    init: "init_lora_weights",
    training: &[
        "r",
        "target_r",
        "tinit",
        "tfinal",
        "deltaT",
        "beta1",
        "beta2",
        "orth_reg_weight",
        "total_step",
        "use_rslora",
        "alpha_pattern",
    ],
    folded: Some(Folded { config: adalora_scale, tensors: adalora_values }),
    ..PLAIN
};

/// The scale is `lora_alpha / (init_r + 1e-5)` whatever is left of the rank.
fn adalora_scale(config: &mut AdapterConfig) {
    let rank = config.rank.unwrap_or(1) as f64;
    let alpha = config.alpha.filter(|alpha| *alpha > 0.0).unwrap_or(rank);
    config.alpha = Some(alpha * rank / (rank + 1e-5));
}

fn adalora_values(tensors: &mut GivenTensors) -> Result<(), String> {
    let (Some(values), Some(factor)) = (tensors.remove("e"), tensors.remove("a")) else {
        return Err("lora_E and lora_A belong together, and one is missing".into());
    };
    let (shape, count) = (factor.shape().as_slice().to_vec(), values.shape().as_slice().to_vec());
    let [rank, d_in] = shape[..] else { return Err(format!("lora_A has shape {shape:?}; it must be a matrix")) };
    if count != [rank, 1] {
        return Err(format!("lora_E has shape {count:?}; it must be {:?}", [rank, 1]));
    }
    let product = match rank {
        0 => TensorData::new(Vec::<f32>::new(), [0, d_in]),
        _ => {
            let [factor, values] = [factor, values].map(|data| Tensor::<2>::from_data(data, &Device::default()));
            (factor * values).into_data()
        }
    };
    tensors.insert("a".into(), product);
    Ok(())
}

const VERA: Layout = Layout {
    structure: "vera",
    types: &["VERA"],
    bias: Some("vera_only"),
    tensors: &[("lambda_b", "vera_lambda_b"), ("lambda_d", "vera_lambda_d")],
    shared: &[("vera_a", "vera_A", None), ("vera_b", "vera_B", None)],
    rank: Some(("r", 256)),
    dropout: Some("vera_dropout"),
    seed: Some("projection_prng_key"),
    read: |keys| {
        let start = keys.number("d_initial")?.unwrap_or(0.1);
        Ok(AdapterOptions::from_iter([("d_initial".to_string(), json!(start))]))
    },
    write: |config| {
        let start = option(config, "d_initial").unwrap_or(json!(0.1));
        Ok(vec![("d_initial", start), ("save_projection", json!(true))])
    },
    ..PLAIN
};

const RANDLORA: Layout = Layout {
    structure: "randlora",
    types: &["RANDLORA"],
    bias: Some("randlora_only"),
    tensors: &[("lambda", "randlora_lambda"), ("gamma", "randlora_gamma")],
    shared: &[("basis_a", "randlora_A", Some(1)), ("basis_b", "randlora_B", None)],
    rank: Some(("r", 32)),
    alpha: Some(("randlora_alpha", 640.0)),
    dropout: Some("randlora_dropout"),
    seed: Some("projection_prng_key"),
    read: |keys| {
        let sparse = ["sparse", "very_sparse"].map(|key| Ok((key.to_string(), json!(keys.flag(key)?))));
        sparse.into_iter().collect()
    },
    write: |config| {
        let flag = |name: &str| option(config, name).unwrap_or(json!(false));
        if flag("sqrt_n_scaling") == json!(true) {
            return Err("the scale cannot fall with the number of bases (sqrt_n_scaling)".into());
        }
        Ok(vec![("sparse", flag("sparse")), ("very_sparse", flag("very_sparse")), ("save_projection", json!(true))])
    },
    ..PLAIN
};

const BONE: Layout = Layout {
    structure: "bone",
    types: &["MISS", "BONE"],
    bias: Some("miss_only"),
    tensors: &[("block", "miss_block"), ("block", "bone_block")],
    rank: Some(("r", 64)),
    dropout: Some("miss_dropout"),
    read: |keys| {
        let mini = keys.count("mini_r")?;
        let (mode, mini) = match keys.take("init_weights") {
            None | Some(Value::Bool(_)) => ("shared", None),
            Some(Value::String(name)) if name == "bat" => ("block_affine_out", None),
            Some(Value::String(name)) if name == "mini" => ("shared_mini", mini),
            Some(other) => return Err(format!("init_weights is {other}; it must be true, false, \"bat\" or \"mini\"")),
        };
        Ok(options([("mode", json!(mode)), ("mini_r", json!(mini))]))
    },
    write: |config| {
        let init = match option(config, "mode").as_ref().map_or(Some("block_affine_out"), Value::as_str) {
            Some("block_affine_out") => json!("bat"),
            Some("shared") => json!(true),
            Some("shared_mini") => json!("mini"),
            other => return Err(format!("mode {}", other.unwrap_or("unknown"))),
        };
        Ok(vec![("init_weights", init), ("mini_r", option(config, "mini_r").unwrap_or(json!(1)))])
    },
    ..PLAIN
};

const LOHA: Layout = Layout {
    structure: "loha",
    types: &["LOHA"],
    tensors: &[("w1_a", "hada_w1_a"), ("w1_b", "hada_w1_b"), ("w2_a", "hada_w2_a"), ("w2_b", "hada_w2_b")],
    ranks: Some("rank_pattern"),
    alpha: Some(("alpha", 8.0)),
    alphas: Some("alpha_pattern"),
    dropout: None,
    bias: None,
    training: &["rank_dropout", "module_dropout", "use_effective_conv2d"],
    ..PLAIN
};

const LOKR: Layout = Layout {
    structure: "lokr",
    types: &["LOKR"],
    tensors: &[
        ("w1", "lokr_w1"),
        ("w1_a", "lokr_w1_a"),
        ("w1_b", "lokr_w1_b"),
        ("w2", "lokr_w2"),
        ("w2_a", "lokr_w2_a"),
        ("w2_b", "lokr_w2_b"),
    ],
    training: &["rank_dropout", "rank_dropout_scale", "module_dropout", "use_effective_conv2d"],
    read: |keys| {
        let factor = keys.take("decompose_factor").unwrap_or(json!(-1));
        Ok(options([("decompose_both", json!(keys.flag("decompose_both")?)), ("decompose_factor", factor)]))
    },
    write: |config| Ok(stated(config, &[("decompose_both", json!(false)), ("decompose_factor", json!(-1))])),
    ..LOHA
};

/// Options of OFT that have the same name in `peft`, with the values of a configuration that does not name them.
const OF_OFT: [(&str, Value); 4] = [
    ("block_share", Value::Bool(false)),
    ("coft", Value::Bool(false)),
    ("use_cayley_neumann", Value::Bool(true)),
    ("fan_in_fan_out", Value::Bool(false)),
];

const OFT: Layout = Layout {
    structure: "oft",
    types: &["OFT"],
    bias: Some("oft_only"),
    tensors: &[("r", "oft_R.weight")],
    rank: None,
    dropout: None,
    training: &["module_dropout"],
    read: |keys| {
        let mut read = Vec::new();
        for (key, usual) in &OF_OFT[..3] {
            read.push((*key, keys.take(key).unwrap_or(usual.clone())));
        }
        let (blocks, size) = (keys.count("r")?.unwrap_or(0), keys.count("oft_block_size")?.unwrap_or(32));
        match (blocks, size) {
            (0, 0) => return Err("r and oft_block_size are both 0; one of them must be given".into()),
            (0, size) => read.push(("oft_block_size", json!(size))),
            (blocks, _) => read.push(("blocks", json!(blocks))),
        }
        read.push(("eps", json!(keys.number("eps")?.unwrap_or(6e-5))));
        read.push(("num_cayley_neumann_terms", json!(keys.count("num_cayley_neumann_terms")?.unwrap_or(5))));
        Ok(options(read))
    },
    write: |config| {
        let number = |name: &str, usual: Value| option(config, name).unwrap_or(usual);
        let blocks = number("blocks", json!(0));
        let size = if blocks == json!(0) { number("oft_block_size", json!(32)) } else { json!(0) };
        let mut keys = stated(config, &OF_OFT);
        keys.extend([("r", blocks), ("oft_block_size", size), ("eps", number("eps", json!(6e-5)))]);
        keys.push(("num_cayley_neumann_terms", number("num_cayley_neumann_terms", json!(5))));
        Ok(keys)
    },
    ..PLAIN
};

const IA3: Layout = Layout {
    structure: "ia3",
    types: &["IA3"],
    tensors: &[("l", "ia3_l")],
    rank: None,
    dropout: None,
    init: "init_ia3_weights",
    targets: &["k_proj", "v_proj", "down_proj"],
    bias: None,
    lacks: &["layers_to_transform", "layers_pattern"],
    read: |keys| {
        let modules = match keys.take("feedforward_modules") {
            None => "down_proj".into(),
            Some(Value::String(expression)) => expression,
            Some(Value::Array(names)) => {
                let names: Option<Vec<&str>> = names.iter().map(Value::as_str).collect();
                names.ok_or("feedforward_modules must be a text or a list of names")?.join(",")
            }
            Some(other) => return Err(format!("feedforward_modules is {other}; it must be a text or a list of names")),
        };
        Ok(options([("feedforward_modules", json!(modules))]))
    },
    write: |config| {
        let text = option(config, "feedforward_modules").unwrap_or(json!("down_proj"));
        let text = text.as_str().unwrap_or_default();
        let is_name = |part: &str| part.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '.');
        let names: Vec<&str> = text.split(',').filter(|name| !name.is_empty()).collect();
        // peft rejects a list of names that are not all in the list of its targets, but no expression. Layers that are left out are left out of
        // that list by writing the others with their whole paths.
        let in_targets = |name: &&str| match &config.targets {
            Targets::Names(targets) => {
                config.exclude.is_none() && config.layers.is_none() && targets.iter().any(|target| target == name)
            }
            _ => config.exclude.is_none() && config.layers.is_none(),
        };
        let modules = match text.split(',').all(is_name) {
            true if names.iter().all(in_targets) => json!(names),
            true => json!(format!(".*(?:{})", names.join("|").replace('.', r"\."))),
            false => json!(text),
        };
        Ok(vec![("feedforward_modules", modules), ("fan_in_fan_out", json!(false))])
    },
    ..PLAIN
};

const HIRA: Layout = Layout {
    structure: "hira",
    types: &["HIRA"],
    tensors: &[("a", "hira_A"), ("b", "hira_B")],
    rank: Some(("r", 32)),
    // peft takes the key, and gives every layer the same rank.
    training: &["rank_pattern"],
    dropout: Some("hira_dropout"),
    bias: None,
    ..PLAIN
};

const SHIRA: Layout = Layout {
    structure: "shira",
    types: &["SHIRA"],
    tensors: &[("weight", "shira_weight"), ("indices", "shira_indices")],
    whole: &["indices"],
    rank: Some(("r", 32)),
    dropout: None,
    bias: None,
    lacks: &["layers_to_transform", "layers_pattern"],
    read: |keys| {
        keys.text("mask_type")?;
        Ok(options([("random_seed", json!(keys.count("random_seed")?))]))
    },
    write: |config| {
        let mut keys = stated(config, &[("random_seed", Value::Null), ("fan_in_fan_out", json!(false))]);
        keys.push(("mask_type", json!("random")));
        Ok(keys)
    },
    ..PLAIN
};

const FOURIERFT: Layout = Layout {
    structure: "fourierft",
    types: &["FOURIERFT"],
    bias: Some("fourier_only"),
    tensors: &[("spectrum", "fourierft_spectrum")],
    rank: Some(("n_frequency", 1000)),
    ranks: Some("n_frequency_pattern"),
    dropout: None,
    read: |keys| {
        let scaling = keys.number("scaling")?.unwrap_or(150.0);
        let seed = keys.count("random_loc_seed")?.unwrap_or(777);
        Ok(options([("scaling", json!(scaling)), ("random_loc_seed", json!(seed))]))
    },
    write: |config| Ok(stated(config, &[("scaling", json!(150.0)), ("random_loc_seed", json!(777))])),
    ..PLAIN
};

fn options(pairs: impl IntoIterator<Item = (&'static str, Value)>) -> AdapterOptions {
    pairs.into_iter().map(|(name, value)| (name.to_string(), value)).collect()
}

/// An option that is set.
fn option(config: &AdapterConfig, name: &str) -> Option<Value> {
    config.options.get(name).filter(|value| !value.is_null()).cloned()
}

/// Options under their own names, with the values of a configuration that does not name them.
fn stated(config: &AdapterConfig, usual: &[(&'static str, Value)]) -> Vec<(&'static str, Value)> {
    usual.iter().map(|(name, usual)| (*name, option(config, name).unwrap_or(usual.clone()))).collect()
}

impl Layout {
    /// The layout of a structure; none where `peft` does not have it.
    pub fn of(structure: &str) -> Option<&'static Self> {
        LAYOUTS.iter().find(|layout| layout.structure == structure)
    }

    /// The layout of plain LoRA.
    pub fn lora() -> &'static Self {
        &LAYOUTS[0]
    }

    /// The layout that a configuration asks for.
    pub fn asked(kind: &str, keys: &mut Keys) -> Result<&'static Self, String> {
        let dora = keys.flag("use_dora")?;
        let structure = |layout: &Layout| !dora || layout.structure == "dora";
        let found = LAYOUTS.iter().find(|layout| layout.types.contains(&kind) && structure(layout));
        found.ok_or_else(|| {
            let known: Vec<&str> =
                LAYOUTS.iter().filter(|layout| layout.structure != "dora").flat_map(|l| l.types).copied().collect();
            match dora {
                _ if kind == "XLORA" => format!(
                    "peft_type is \"{kind}\": a mixture of adapters that depends on the input, not one adapter; attach the folder of one of its experts"
                ),
                true => format!("peft_type is \"{kind}\" with use_dora, which cannot be read"),
                false => format!(
                    "peft_type is \"{kind}\"; known are {}: let peft merge it (merge_and_unload) and use the merged model",
                    known.join(", ")
                ),
            }
        })
    }

    /// Returns true if a part of the name of a tensor, between dots, begins as those of an adapter of any known type.
    pub fn is_of_adapter(part: &str) -> bool {
        let begins = |name: &str| name.split_inclusive('_').next().is_some_and(|first| part.starts_with(first));
        LAYOUTS.iter().flat_map(|layout| layout.tensors).any(|(_, name)| begins(name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_name_structures_and_fields_that_exist() {
        for layout in LAYOUTS.iter().filter(|layout| layout.folded.is_none()) {
            let spec = lowrank_adapters::StructureEntry::find(layout.structure).unwrap().spec;
            let fields = layout.tensors.iter().chain(layout.embedding).map(|(field, _)| field);
            let shared = layout.shared.iter().map(|(field, ..)| field);
            for field in fields.chain(shared).chain(layout.whole) {
                assert!(spec.tensor(field).is_some(), "{} has no tensor {field}", layout.structure);
            }
        }
    }

    #[test]
    fn options_come_back_as_they_were_written() {
        for layout in LAYOUTS.iter().filter(|layout| layout.folded.is_none()) {
            let usual = lowrank_adapters::StructureEntry::find(layout.structure).unwrap().entry.options();
            let written = (layout.write)(&AdapterConfig::new(layout.structure)).unwrap();
            let text = Value::Object(options(written)).to_string();
            let read = (layout.read)(&mut Keys::parse(&text).unwrap()).unwrap();
            let set: Vec<_> = read.iter().filter(|(_, value)| !value.is_null()).collect();
            for (name, value) in set {
                let default =
                    usual.iter().find(|option| option.name == *name).and_then(|option| option.default.clone());
                let same = default.as_ref().map(Value::as_f64) == Some(value.as_f64()) && value.is_number();
                assert!(same || default.as_ref() == Some(value), "{}: {name} is {value}", layout.structure);
            }
        }
    }
}
