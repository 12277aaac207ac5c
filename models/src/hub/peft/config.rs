//! `adapter_config.json`.

use std::collections::BTreeMap;

use serde::de::{DeserializeOwned, IgnoredAny};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::folder::{OURS, Ours};
use super::keys::Keys;
use super::layout::{Layout, Stored};
use super::ordered::Ordered;
use lowrank_adapters::{AdapterConfig, NamePattern, Scaling, Targets, TrainedBiases};

/// A configuration that has been read.
pub(super) struct Read {
    pub config: AdapterConfig,
    /// Layout in which `peft` stores the structure; none for folders of our own.
    pub layout: Option<&'static Layout>,
    pub base_model: Option<String>,
    /// Ranks that are left of layers, by the paths of the layers.
    pub ranks: BTreeMap<String, usize>,
    /// Embedding and head that share a table keep sharing it when one of them is trained whole.
    pub keeps_tie: bool,
    pub warnings: Vec<String>,
}

pub(super) fn parse(text: &str) -> Result<Read, String> {
    let mut keys = Keys::parse(text)?;
    let kind = keys.text("peft_type")?.ok_or("peft_type is missing; is this the folder of an adapter?")?;
    let ours = keys.take(OURS).map(serde_json::from_value::<Ours>).transpose();
    let ours = ours.map_err(|error| format!("{OURS}: {error}"))?;
    let (mut config, layout) = match ours {
        Some(ours) => (own(ours, &kind, &mut keys)?, None),
        None => {
            let layout = Layout::asked(&kind, &mut keys)?;
            (exchanged(layout, &mut keys)?, Some(layout))
        }
    };
    let ranks = match layout.is_some_and(|layout| layout.folded.is_some()) {
        true => keys.masks("rank_pattern")?,
        false => BTreeMap::new(),
    };
    if let Some(key) = layout.map_or(Some("rank_pattern"), |layout| layout.ranks) {
        config.rank_pattern = pattern(text, key)?;
        keys.take(key);
    }
    if let Some(key) = layout.map_or(Some("alpha_pattern"), |layout| layout.alphas) {
        config.alpha_pattern = pattern(text, key)?;
        keys.take(key);
    }
    let usual = layout.unwrap_or(Layout::lora()).targets;
    let usual = || Targets::Names(usual.iter().map(|name| name.to_string()).collect());
    config.targets = keys.targets("target_modules")?.unwrap_or_else(usual);
    config.exclude = keys.targets("exclude_modules")?;
    config.layers = keys.layers()?;
    let pattern = keys.targets("layers_pattern")?;
    if let (Some(_), Some(pattern)) = (&config.layers, pattern) {
        check_layers(&pattern)?;
    }
    let base_model = keys.text("base_model_name_or_path")?;
    config.modules_to_save = keys.modules_to_save()?;
    config.token_rows = keys.tokens()?;
    config.bias = match keys.text("bias")?.as_deref() {
        None | Some("none") => TrainedBiases::None,
        Some("all") => TrainedBiases::All,
        Some(which) if which.ends_with("_only") => TrainedBiases::Adapted,
        Some(which) => return Err(format!("bias is \"{which}\"; it must be none, all or those of the adapted layers")),
    };
    config.validate().map_err(|error| error.to_string())?;
    let keeps_tie = keys.flag("ensure_weight_tying")?;
    Ok(Read { config, layout, base_model, ranks, keeps_tie, warnings: keys.finish()? })
}

/// A value that may be an object whose order counts.
#[derive(Deserialize)]
#[serde(untagged)]
enum Entry<T> {
    Pairs(Ordered<T>),
    Other(IgnoredAny),
}

/// Values by patterns of names, in the order of the file.
fn pattern<T: DeserializeOwned>(text: &str, key: &str) -> Result<Vec<(String, T)>, String> {
    let mut all: BTreeMap<String, Entry<T>> = serde_json::from_str(text).map_err(|error| error.to_string())?;
    match all.remove(key) {
        None => Ok(Vec::new()),
        Some(Entry::Pairs(pairs)) => Ok(pairs.0),
        Some(Entry::Other(_)) => Err(format!("{key} must be an object of patterns with numbers")),
    }
}

/// Reads a configuration in the keys of `peft`.
fn exchanged(layout: &Layout, keys: &mut Keys) -> Result<AdapterConfig, String> {
    let options = (layout.read)(keys)?;
    let scaling = match layout.stabilised && keys.flag("use_rslora")? {
        true => Scaling::RootRank,
        false => Scaling::Rank,
    };
    let mut config = AdapterConfig {
        rank: match layout.rank {
            Some((key, usual)) => Some(keys.count(key)?.unwrap_or(usual)),
            None => None,
        },
        alpha: match layout.alpha {
            Some((key, usual)) => Some(keys.number(key)?.unwrap_or(usual)),
            None => None,
        },
        scaling: layout.alpha.map(|_| scaling),
        dropout: match layout.dropout {
            Some(key) => keys.number(key)?.unwrap_or(0.0),
            None => 0.0,
        },
        seed: match layout.seed {
            Some(key) => keys.count(key)?.unwrap_or(0) as u64,
            None => 0,
        },
        init: start(layout.init, keys)?,
        options,
        ..AdapterConfig::new(layout.structure)
    };
    for key in layout.training {
        keys.take(key);
    }
    if let Some(folded) = &layout.folded {
        (folded.config)(&mut config);
    }
    Ok(config)
}

/// Reads a configuration in the keys of `peft` where it has them, and in ours otherwise.
fn own(ours: Ours, kind: &str, keys: &mut Keys) -> Result<AdapterConfig, String> {
    let config = AdapterConfig {
        rank: keys.count("r")?,
        alpha: keys.number("lora_alpha")?,
        dropout: keys.number("lora_dropout")?.unwrap_or(0.0),
        scaling: ours.scaling,
        init: ours.init,
        seed: ours.seed,
        options: ours.options,
        ..AdapterConfig::new(&ours.structure)
    };
    let spec = config.entry().map_err(|error| error.to_string())?.spec;
    let known = own_type(spec.name);
    match known == kind {
        true => Ok(config),
        false => Err(format!("peft_type is \"{kind}\"; folders of {} have \"{known}\"", spec.name)),
    }
}

/// `peft_type` of a folder in our own form, which `peft` rejects whatever types it learns: it would compute another adapter.
fn own_type(structure: &str) -> String {
    format!("LOWRANK_{}", structure.to_uppercase().replace('-', "_"))
}

/// Initialisation, which matters only if it changes the base weights: the stored tensors replace all others.
fn start(key: &str, keys: &mut Keys) -> Result<String, String> {
    Ok(match keys.take(key) {
        None | Some(Value::Bool(_)) => "default".into(),
        Some(Value::String(name)) => match name.as_str() {
            "gaussian" | "orthogonal" | "eva" | "lycoris" => "default".into(),
            "olora" => name,
            name if name == "pissa" || name.starts_with("pissa_niter_") => "pissa".into(),
            name => {
                return Err(format!(
                    "{key} is \"{name}\", which changes the base weights in a way that the folder does not state; let peft save it converted \
                     (path_initial_model_for_weight_conversion)"
                ));
            }
        },
        Some(other) => return Err(format!("{key} is {other}; it must be true, false or a text")),
    })
}

/// Rejects names of a list of blocks that a LLaMA does not have.
fn check_layers(pattern: &Targets) -> Result<(), String> {
    let names = match pattern {
        Targets::AllLinear => Vec::new(),
        Targets::Names(names) => names.clone(),
        Targets::Pattern(pattern) => vec![pattern.clone()],
    };
    let given: Vec<&String> = names.iter().filter(|name| !name.is_empty()).collect();
    let fits = |name: &&String| NamePattern::new(name, "layers_pattern").and_then(|name| name.matches("model.layers"));
    let fits = given.iter().map(fits).collect::<Result<Vec<bool>, _>>().map_err(|error| error.to_string())?;
    match fits.is_empty() || fits.contains(&true) {
        true => Ok(()),
        false => Err(format!("layers_pattern is {names:?}; the blocks of this model are in \"layers\"")),
    }
}

/// A configuration to write: everything in it is resolved.
pub(super) struct Written<'a> {
    pub config: &'a AdapterConfig,
    /// Layout in which `peft` stores the structure, and keys of its options; none for folders of our own.
    pub layout: Option<Stored>,
    /// Paths of the adapted layers.
    pub paths: Vec<&'a str>,
    pub base_model: Option<&'a str>,
    /// The head serves as the embedding that is saved whole.
    pub ties: bool,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Field {
    Value(Value),
    Ranks(Ordered<usize>),
    Alphas(Ordered<Value>),
}

impl Written<'_> {
    /// The text, sorted by key; patterns keep their order.
    pub fn text(self) -> String {
        let config = self.config;
        let mut fields: BTreeMap<&str, Field> = BTreeMap::new();
        let mut put = |key, value: Value| {
            fields.insert(key, Field::Value(value));
        };
        for key in ["auto_mapping", "layers_pattern", "layers_to_transform", "revision"] {
            put(key, Value::Null);
        }
        let saved = (!config.modules_to_save.is_empty()).then_some(&config.modules_to_save);
        put("modules_to_save", json!(saved));
        put("base_model_name_or_path", json!(self.base_model));
        // Only the configuration of LoRA has the key.
        if self.ties && self.layout.as_ref().is_none_or(|(layout, _)| layout.structure == Layout::lora().structure) {
            put("ensure_weight_tying", json!(true));
        }
        let adapted = self.layout.as_ref().map_or(Some("adapted_only"), |(layout, _)| layout.bias);
        match (adapted, config.bias) {
            (_, TrainedBiases::All) => put("bias", json!("all")),
            (Some(word), TrainedBiases::Adapted) => put("bias", json!(word)),
            (None, _) => {}
            (_, TrainedBiases::None) => put("bias", json!("none")),
        }
        if !config.token_rows.is_empty() {
            let rows = config.token_rows.iter().map(|(module, rows)| (module.clone(), json!(rows)));
            put("trainable_token_indices", Value::Object(rows.collect()));
        }
        put("inference_mode", json!(true));
        // The class that peft wraps a model in; one for language models cannot hold another.
        let language = self.paths.iter().all(|path| path.starts_with("model.") || *path == "lm_head");
        put("task_type", if language { json!("CAUSAL_LM") } else { Value::Null });
        put("target_modules", self.targets());
        let alpha = config.alpha.map_or(Value::Null, number);
        let (ranks, alphas) = match self.layout {
            Some((layout, more)) => {
                put("peft_type", json!(layout.types[0]));
                if let Some((key, _)) = layout.rank {
                    put(key, json!(config.rank));
                }
                if let Some(key) = layout.dropout {
                    put(key, json!(config.dropout));
                }
                // An initialisation that changes the base is reported; the tensors are there in any case.
                let part = config.initialisation().is_some_and(|init| init.starts_from_weight);
                let init = if part { json!(config.init) } else { json!(true) };
                put(layout.init, init);
                if let Some((key, _)) = layout.alpha {
                    put(key, alpha);
                }
                if let Some(key) = layout.seed {
                    put(key, json!(config.seed));
                }
                if layout.stabilised {
                    put("use_rslora", json!(config.scaling == Some(Scaling::RootRank)));
                    put("exclude_modules", Value::Null);
                }
                more.into_iter().for_each(|(key, value)| put(key, value));
                for key in layout.lacks {
                    fields.remove(key);
                }
                (layout.ranks, layout.alphas)
            }
            None => {
                let spec = match config.entry() {
                    Ok(entry) => entry.spec,
                    Err(error) => unreachable!("the adapter was built: {error}"),
                };
                put("peft_type", json!(own_type(spec.name)));
                put("r", json!(config.rank));
                put("lora_alpha", alpha);
                put("lora_dropout", json!(config.dropout));
                put(OURS, json!(Ours::of(config)));
                (Some("rank_pattern"), Some("alpha_pattern"))
            }
        };
        if let Some(key) = ranks {
            fields.insert(key, Field::Ranks(Ordered(config.rank_pattern.clone())));
        }
        if let Some(key) = alphas {
            let alphas = config.alpha_pattern.iter().map(|(name, alpha)| (name.clone(), number(*alpha)));
            fields.insert(key, Field::Alphas(Ordered(alphas.collect())));
        }
        match serde_json::to_string_pretty(&fields) {
            Ok(text) => text + "\n",
            Err(error) => unreachable!("a map of plain values is JSON: {error}"),
        }
    }

    /// The targets as given; the layers one by one where `peft` cannot express them.
    fn targets(&self) -> Value {
        match (&self.config.targets, &self.config.exclude, &self.config.layers) {
            (Targets::Names(names), None, None) => json!(names),
            (targets, None, None) => json!(targets.to_string()),
            _ => json!(self.paths),
        }
    }
}

impl Ours {
    pub fn of(config: &AdapterConfig) -> Self {
        Self {
            structure: config.structure.clone(),
            init: config.init.clone(),
            scaling: config.scaling,
            seed: config.seed,
            options: config.options.clone(),
        }
    }
}

/// A whole number as such, as `peft` writes its own.
fn number(value: f64) -> Value {
    match value.fract() == 0.0 && value.abs() < 1e15 {
        true => json!(value as i64),
        false => json!(value),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(more: &str) -> Result<Read, String> {
        parse(&format!(r#"{{"peft_type": "LORA", "r": 4{more}}}"#))
    }

    #[test]
    fn missing_keys_take_the_values_of_peft() {
        let read = parse(r#"{"peft_type": "LORA"}"#).unwrap();
        assert_eq!((read.config.rank, read.config.alpha), (Some(8), Some(8.0)));
        assert_eq!(read.config.targets, Targets::Names(vec!["q_proj".into(), "v_proj".into()]));
        assert!(read.warnings.is_empty());
    }

    #[test]
    fn unknown_keys_are_told_and_patterns_keep_their_order() {
        let read = read(r#", "future": 1, "rank_pattern": {"z": 3, "a": 2}, "alpha_pattern": null"#).unwrap();
        assert_eq!(read.warnings, ["key future is unknown and ignored"]);
        assert_eq!(read.config.rank_pattern, [("z".to_string(), 3), ("a".to_string(), 2)]);
    }

    #[test]
    fn what_changes_the_arithmetic_is_refused_by_key() {
        for more in [
            r#""layer_replication": [[0, 2]]"#,
            r#""megatron_config": {"x": 1}"#,
            r#""alora_invocation_tokens": [1]"#,
            r#""target_parameters": ["w"]"#,
            r#""lora_bias": true"#,
            r#""init_lora_weights": "loftq""#,
            r#""lora_alpha": "big""#,
            r#""lora_dropout": 1.5"#,
            r#""target_modules": [1]"#,
            r#""use_rslora": 3"#,
            r#""layers_to_transform": [0], "layers_pattern": "h""#,
            r#""rank_pattern": {"q_proj": 0}"#,
            r#""rank_pattern": {"q_proj": -1}"#,
        ] {
            let key = more.split('"').nth(1).unwrap();
            let message = read(&format!(", {more}")).map(|_| ()).unwrap_err();
            let known = [key, "pattern", "dropout", "targets", "rank"];
            assert!(known.iter().any(|word| message.contains(word)), "{more}: {message}");
        }
        assert!(parse(r#"{"peft_type": "BOFT"}"#).map(|_| ()).unwrap_err().contains("LOHA"));
        assert!(parse(r#"{"r": 4}"#).map(|_| ()).unwrap_err().contains("peft_type"));
    }

    #[test]
    fn what_says_nothing_is_taken_in_silence() {
        let more = r#", "layer_replication": null, "modules_to_save": [], "megatron_core": "megatron.core", "lora_bias": false"#;
        assert!(read(more).unwrap().warnings.is_empty());
        assert_eq!(read(r#", "bias": "all""#).unwrap().config.bias, TrainedBiases::All);
        assert_eq!(read(r#", "bias": "lora_only""#).unwrap().config.bias, TrainedBiases::Adapted);
        assert!(read(r#", "bias": "some""#).is_err());
        assert_eq!(
            read(r#", "layers_to_transform": 1, "layers_pattern": "layers""#).unwrap().config.layers,
            Some(vec![1])
        );
    }
}
