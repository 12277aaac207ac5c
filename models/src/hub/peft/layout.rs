//! Table of the structures that `peft` supports and of their names there.

use serde_json::{Value, json};

use super::keys::Keys;
use lowrank_adapters::{AdapterConfig, AdapterOptions};

/// Layout in which `peft` stores a structure.
#[derive(Debug)]
pub(super) struct Layout {
    /// Name of the structure.
    pub structure: &'static str,
    /// Types it is read from; the first one is written.
    pub types: &'static [&'static str],
    /// Fields and the names of their tensors.
    pub tensors: &'static [(&'static str, &'static str)],
    /// Fields that all layers share, the names of their tensors, and the axis of length 1 that `peft` puts between.
    pub shared: &'static [(&'static str, &'static str, Option<usize>)],
    /// Rank of a configuration without one.
    pub rank: usize,
    /// Key of alpha, and its value when missing; none where there is no alpha.
    pub alpha: Option<(&'static str, f64)>,
    /// Key of the dropout.
    pub dropout: &'static str,
    /// Key of the start.
    pub init: &'static str,
    /// Ranks and alphas may differ by layer, and the scale may be stabilised.
    pub patterns: bool,
    /// Key of the seed; none where the file contains all random tensors.
    pub seed: Option<&'static str>,
    /// Reads the options of the structure.
    pub read: fn(&mut Keys) -> Result<AdapterOptions, String>,
    /// Keys of the options of the structure; a reason where `peft` does not have them.
    pub write: fn(&AdapterConfig) -> Result<Options, String>,
}

/// Keys of the options of a structure, and their values.
pub(super) type Options = Vec<(&'static str, Value)>;
/// A layout, and the options of a configuration in its keys.
pub(super) type Stored = (&'static Layout, Options);

/// All of them.
static LAYOUTS: &[Layout] = &[LORA, DORA, VERA, RANDLORA, BONE];

const LORA: Layout = Layout {
    structure: "lora",
    types: &["LORA"],
    tensors: &[("a", "lora_A.weight"), ("b", "lora_B.weight")],
    shared: &[],
    rank: 8,
    alpha: Some(("lora_alpha", 8.0)),
    dropout: "lora_dropout",
    init: "init_lora_weights",
    patterns: true,
    seed: None,
    read: |_| Ok(AdapterOptions::new()),
    write: |_| Ok(vec![("use_dora", json!(false))]),
};

const DORA: Layout = Layout {
    structure: "dora",
    tensors: &[("a", "lora_A.weight"), ("b", "lora_B.weight"), ("magnitude", "lora_magnitude_vector")],
    write: |_| Ok(vec![("use_dora", json!(true))]),
    ..LORA
};

const VERA: Layout = Layout {
    structure: "vera",
    types: &["VERA"],
    tensors: &[("lambda_b", "vera_lambda_b"), ("lambda_d", "vera_lambda_d")],
    shared: &[("vera_a", "vera_A", None), ("vera_b", "vera_B", None)],
    rank: 256,
    alpha: None,
    dropout: "vera_dropout",
    init: "init_weights",
    patterns: false,
    seed: Some("projection_prng_key"),
    read: |keys| {
        let start = keys.number("d_initial")?.unwrap_or(0.1);
        Ok(AdapterOptions::from_iter([("d_initial".to_string(), json!(start))]))
    },
    write: |config| {
        let start = config.options.get("d_initial").cloned().unwrap_or(json!(0.1));
        Ok(vec![("d_initial", start), ("save_projection", json!(true))])
    },
};

const RANDLORA: Layout = Layout {
    structure: "randlora",
    types: &["RANDLORA"],
    tensors: &[("lambda", "randlora_lambda"), ("gamma", "randlora_gamma")],
    shared: &[("basis_a", "randlora_A", Some(1)), ("basis_b", "randlora_B", None)],
    rank: 32,
    alpha: Some(("randlora_alpha", 640.0)),
    dropout: "randlora_dropout",
    init: "init_weights",
    patterns: false,
    seed: Some("projection_prng_key"),
    read: |keys| {
        let sparse = ["sparse", "very_sparse"].map(|key| Ok((key.to_string(), json!(keys.flag(key)?))));
        sparse.into_iter().collect()
    },
    write: |config| {
        let flag = |name: &str| config.options.get(name).cloned().unwrap_or(json!(false));
        if flag("sqrt_n_scaling") == json!(true) {
            return Err("the scale cannot fall with the number of bases (sqrt_n_scaling)".into());
        }
        Ok(vec![("sparse", flag("sparse")), ("very_sparse", flag("very_sparse")), ("save_projection", json!(true))])
    },
};

const BONE: Layout = Layout {
    structure: "bone",
    types: &["MISS", "BONE"],
    tensors: &[("block", "miss_block"), ("block", "bone_block")],
    shared: &[],
    rank: 64,
    alpha: None,
    dropout: "miss_dropout",
    init: "init_weights",
    patterns: false,
    seed: None,
    read: |keys| {
        let mini = keys.count("mini_r")?;
        let (mode, mini) = match keys.take("init_weights") {
            None | Some(Value::Bool(_)) => ("shared", None),
            Some(Value::String(name)) if name == "bat" => ("block_affine_out", None),
            Some(Value::String(name)) if name == "mini" => ("shared_mini", mini),
            Some(other) => return Err(format!("init_weights is {other}; it must be true, false, \"bat\" or \"mini\"")),
        };
        let options = [("mode", json!(mode)), ("mini_r", json!(mini))];
        Ok(options.into_iter().map(|(name, value)| (name.to_string(), value)).collect())
    },
    write: |config| {
        let option = |name: &str| config.options.get(name).filter(|value| !value.is_null()).cloned();
        let init = match option("mode").as_ref().map_or(Some("block_affine_out"), Value::as_str) {
            Some("block_affine_out") => json!("bat"),
            Some("shared") => json!(true),
            Some("shared_mini") => json!("mini"),
            other => return Err(format!("mode {}", other.unwrap_or("unknown"))),
        };
        Ok(vec![("init_weights", init), ("mini_r", option("mini_r").unwrap_or(json!(1)))])
    },
};

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
            let known: Vec<&str> = LAYOUTS.iter().flat_map(|layout| layout.types).copied().collect();
            match dora {
                true => format!("peft_type is \"{kind}\" with use_dora, which cannot be read"),
                false => format!("peft_type is \"{kind}\"; known are {}", known.join(", ")),
            }
        })
    }

    /// The field of a layer's tensor by what follows the path of the layer in its name. The name of an adapter may precede the ending.
    pub fn field(&self, rest: &str) -> Option<&'static str> {
        self.tensors.iter().find(|(_, name)| is_named(rest, name)).map(|(field, _)| *field)
    }

    /// The shared field of a tensor by the end of its name, and its extra axis.
    pub fn shared_field(&self, rest: &str) -> Option<(&'static str, Option<usize>)> {
        self.shared.iter().find(|(_, name, _)| is_named(rest, name)).map(|(field, _, axis)| (*field, *axis))
    }

    /// The name of a field's tensor.
    pub fn name(&self, field: &str) -> Option<&'static str> {
        self.tensors.iter().find(|(known, _)| *known == field).map(|(_, name)| *name)
    }
}

/// Returns true if a tensor has this name, as it is or with the name of an adapter inside: `lora_A.default.weight`.
fn is_named(rest: &str, name: &str) -> bool {
    const ENDING: &str = ".weight";
    let (stem, ending) = match name.strip_suffix(ENDING) {
        Some(stem) => (stem, true),
        None => (name, false),
    };
    let Some(tail) = rest.strip_prefix(stem) else { return false };
    let (tail, ended) = match tail.strip_suffix(ENDING) {
        Some(tail) => (tail, true),
        None => (tail, false),
    };
    let adapter =
        tail.strip_prefix('.').map_or(tail.is_empty(), |adapter| !adapter.is_empty() && !adapter.contains('.'));
    adapter && (ended || !ending)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_may_hold_the_name_of_an_adapter() {
        for (rest, name, same) in [
            ("lora_A.weight", "lora_A.weight", true),
            ("lora_A.default.weight", "lora_A.weight", true),
            ("lora_A", "lora_A.weight", false),
            ("lora_A.default", "lora_A.weight", false),
            ("lora_A.x.y.weight", "lora_A.weight", false),
            ("lora_AB.weight", "lora_A.weight", false),
            ("lora_magnitude_vector", "lora_magnitude_vector", true),
            ("lora_magnitude_vector.weight", "lora_magnitude_vector", true),
            ("lora_magnitude_vector.default.weight", "lora_magnitude_vector", true),
            ("lora_magnitude_vectors", "lora_magnitude_vector", false),
        ] {
            assert_eq!(is_named(rest, name), same, "{rest} {name}");
        }
    }

    #[test]
    fn layouts_name_structures_and_fields_that_exist() {
        for layout in LAYOUTS {
            let spec = lowrank_adapters::StructureEntry::find(layout.structure).unwrap().spec;
            let fields =
                layout.tensors.iter().map(|(field, _)| field).chain(layout.shared.iter().map(|(field, ..)| field));
            for field in fields {
                assert!(spec.tensor(field).is_some(), "{} has no tensor {field}", layout.structure);
            }
        }
    }
}
