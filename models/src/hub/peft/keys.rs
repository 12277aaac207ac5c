//! The keys of `adapter_config.json`, taken one after the other.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use lowrank_adapters::Targets;

/// Keys that were not used yet, and warnings.
pub(super) struct Keys {
    map: Map<String, Value>,
    pub warnings: Vec<String>,
}

/// Keys that do not affect the computation.
const NEUTRAL: [&str; 15] = [
    "auto_mapping",
    "corda_config",
    "eva_config",
    "inference_mode",
    "lora_ga_config",
    "loftq_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "save_projection",
    "task_type",
    "velora_config",
    "peft_type",
];

/// Keys of unsupported methods: any value other than an empty one is rejected.
const REFUSED: [&str; 10] = [
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "megatron_config",
    "monteclora_config",
    "target_parameters",
    "use_bdlora",
    "use_qalora",
];

impl Keys {
    pub fn parse(text: &str) -> Result<Self, String> {
        let map = serde_json::from_str(text).map_err(|error| format!("not a JSON object: {error}"))?;
        Ok(Self { map, warnings: Vec::new() })
    }

    /// A key that is there and not null.
    pub fn take(&mut self, key: &str) -> Option<Value> {
        self.map.remove(key).filter(|value| !value.is_null())
    }

    pub fn text(&mut self, key: &str) -> Result<Option<String>, String> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(format!("{key} is {other}; it must be a text")),
        }
    }

    pub fn count(&mut self, key: &str) -> Result<Option<usize>, String> {
        let Some(value) = self.take(key) else { return Ok(None) };
        let count = value.as_u64().and_then(|count| usize::try_from(count).ok());
        count.map(Some).ok_or_else(|| format!("{key} is {value}; it must be a whole number"))
    }

    pub fn number(&mut self, key: &str) -> Result<Option<f64>, String> {
        let Some(value) = self.take(key) else { return Ok(None) };
        value.as_f64().map(Some).ok_or_else(|| format!("{key} is {value}; it must be a number"))
    }

    pub fn flag(&mut self, key: &str) -> Result<bool, String> {
        match self.take(key) {
            None => Ok(false),
            Some(Value::Bool(flag)) => Ok(flag),
            Some(other) => Err(format!("{key} is {other}; it must be true or false")),
        }
    }

    /// Names, or a regular expression for whole paths.
    pub fn targets(&mut self, key: &str) -> Result<Option<Targets>, String> {
        let wrong = |value: &Value| format!("{key} is {value}; it must be a text or a list of names");
        Ok(match self.take(key) {
            None => None,
            Some(Value::String(text)) if text.eq_ignore_ascii_case("all-linear") => Some(Targets::AllLinear),
            Some(Value::String(text)) => Some(Targets::Pattern(text)),
            Some(Value::Array(names)) => {
                let texts = names.iter().map(|name| name.as_str().map(str::to_string));
                let texts: Option<Vec<String>> = texts.collect();
                Some(Targets::Names(texts.ok_or_else(|| wrong(&Value::Array(names)))?))
            }
            Some(other) => return Err(wrong(&other)),
        })
    }

    /// Modules that are saved whole in addition to the adapter.
    pub fn modules_to_save(&mut self) -> Result<Vec<String>, String> {
        match self.targets("modules_to_save")? {
            None => Ok(Vec::new()),
            Some(Targets::Names(names)) => Ok(names),
            Some(other) => Ok(vec![other.to_string()]),
        }
    }

    /// Rows of modules that are in the file in place of theirs: of the embedding, or by the name of the module.
    pub fn tokens(&mut self) -> Result<Vec<(String, Vec<usize>)>, String> {
        const KEY: &str = "trainable_token_indices";
        let wrong = |value: &Value| format!("{KEY} is {value}; it must be whole numbers, or lists of them by module");
        let rows = |value: &Value| {
            let numbers = value.as_array().into_iter().flatten().map(|row| row.as_u64().map(|row| row as usize));
            numbers.collect::<Option<Vec<usize>>>().filter(|_| value.is_array()).ok_or_else(|| wrong(value))
        };
        match self.take(KEY) {
            None => Ok(Vec::new()),
            Some(Value::Object(modules)) => {
                modules.iter().map(|(name, value)| Ok((name.clone(), rows(value)?))).collect()
            }
            Some(list) => Ok(vec![("embed_tokens".into(), rows(&list)?)]),
        }
    }

    /// Ranks that masks leave, by the paths of the layers.
    pub fn masks(&mut self, key: &str) -> Result<BTreeMap<String, usize>, String> {
        let wrong = |value: &Value| format!("{key} is {value}; it must be lists of true and false by tensor");
        let masks = match self.take(key) {
            None => return Ok(BTreeMap::new()),
            Some(Value::Object(masks)) => masks,
            Some(other) => return Err(wrong(&other)),
        };
        let kept = |(tensor, mask): (&String, &Value)| {
            let flags = mask.as_array().into_iter().flatten().map(Value::as_bool);
            let flags: Option<Vec<bool>> = flags.collect();
            let flags = flags.filter(|_| mask.is_array()).ok_or_else(|| wrong(mask))?;
            let layer = tensor.split(".lora_E").next().unwrap_or_default();
            Ok((layer.to_string(), flags.into_iter().filter(|kept| *kept).count()))
        };
        masks.iter().map(kept).collect()
    }

    /// Numbers of blocks: one, or a list.
    pub fn layers(&mut self) -> Result<Option<Vec<usize>>, String> {
        let Some(value) = self.take("layers_to_transform") else { return Ok(None) };
        let numbers = match &value {
            Value::Array(numbers) => numbers.iter().collect(),
            one => vec![one],
        };
        let numbers = numbers.into_iter().map(|number| number.as_u64().and_then(|number| usize::try_from(number).ok()));
        let numbers: Option<Vec<usize>> = numbers.collect();
        let numbers = numbers.ok_or_else(|| format!("layers_to_transform is {value}; it must be whole numbers"))?;
        Ok((!numbers.is_empty()).then_some(numbers))
    }

    /// Rejects settings that change the arithmetic in an unsupported way, and warns about unused keys.
    pub fn finish(mut self) -> Result<Vec<String>, String> {
        for key in REFUSED {
            if let Some(value) = self.map.remove(key)
                && !is_nothing(&value)
            {
                return Err(format!(
                    "{key} is {value}; adapters with it cannot be read: let peft merge it (merge_and_unload) and use the merged model"
                ));
            }
        }
        if self.flag("fan_in_fan_out")? {
            self.warnings
                .push("fan_in_fan_out is true; linear layers are read as peft reads them, as if it were false".into());
        }
        for key in NEUTRAL {
            self.map.remove(key);
        }
        let unknown = self.map.keys().map(|key| format!("key {key} is unknown and ignored"));
        self.warnings.extend(unknown.collect::<Vec<_>>());
        Ok(self.warnings)
    }
}

fn is_nothing(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    }
}
