//! `config.json` of vision transformers and CLIP.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::file_type::FileType;
use super::keys::Keys;
use super::open::read_text;
use crate::error::ModelError;
use crate::ops::Gelu;
use crate::vit::{
    ClipClassifierConfig, ClipConfig, ClipTextConfig, ClipVisionConfig, EncoderConfig, ImageShape, VitConfig,
};

/// A `config.json`: the settings that the model uses, and the remaining keys, which are kept when the model is written again.
#[derive(Clone, Debug, PartialEq)]
pub struct VisionHub {
    /// Shape and constants.
    pub shape: VisionShape,
    /// Keys that do not change the numbers.
    pub extra: Map<String, Value>,
    /// Settings that matter in training alone and are not followed there, one line each.
    pub warnings: Vec<String>,
}

/// The architectures that can be read.
#[derive(Clone, Debug, PartialEq)]
pub enum VisionShape {
    /// `ViTForImageClassification`.
    Vit(VitConfig),
    /// `CLIPVisionModelWithProjection`.
    ClipVision(ClipVisionConfig),
    /// `CLIPModel`.
    Clip(ClipConfig),
    /// `CLIPForImageClassification`.
    ClipClassifier(ClipClassifierConfig),
}

/// `model_type` of each and the class that writes it.
const VIT: (&str, &str) = ("vit", "ViTForImageClassification");
const CLIP_VISION: (&str, &str) = ("clip_vision_model", "CLIPVisionModelWithProjection");
const CLIP: (&str, &str) = ("clip", "CLIPModel");
const CLIP_CLASSIFIER: (&str, &str) = ("clip", "CLIPForImageClassification");
/// The first of a type is the usual one.
const TYPES: [(&str, &str); 4] = [VIT, CLIP_VISION, CLIP, CLIP_CLASSIFIER];

/// Keys of dropout inside the model.
const DROPOUTS: [&str; 3] = ["hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout"];
/// Keys that describe how the file was written, which would be wrong for the next file.
const STALE: [&str; 6] =
    ["architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "_model_name_or_path"];

impl VisionHub {
    /// Returns true if a `config.json` says that it is one of these models.
    pub fn is_one(path: &Path) -> Result<bool, ModelError> {
        let map: Map<String, Value> = serde_json::from_str(&read_text(path)?)
            .map_err(|error| ModelError::File { path: path.to_path_buf(), reason: format!("not JSON: {error}") })?;
        Ok(map
            .get("model_type")
            .and_then(Value::as_str)
            .is_some_and(|kind| TYPES.iter().any(|(known, _)| *known == kind)))
    }

    /// Reads `config.json`, rejecting other architectures and settings.
    pub fn read(path: &Path) -> Result<Self, ModelError> {
        let text = read_text(path)?;
        Self::parse(&text).map_err(|reason| ModelError::File { path: path.to_path_buf(), reason })
    }

    fn parse(text: &str) -> Result<Self, String> {
        let map = serde_json::from_str(text).map_err(|error| format!("not a JSON object: {error}"))?;
        let mut keys = Keys { map };
        let kind = keys.take("model_type").unwrap_or(Value::Null);
        let classes: Vec<&str> = TYPES.iter().filter(|(known, _)| kind == *known).map(|(_, class)| *class).collect();
        let Some(usual) = classes.first() else {
            let known = [VIT, CLIP_VISION, CLIP].map(|(known, _)| format!("\"{known}\"")).join(", ");
            return Err(format!("model_type is {kind}; {known} can be read"));
        };
        let class = match keys.map.get("architectures") {
            Some(Value::Array(named)) => match classes.iter().find(|class| named.iter().any(|name| name == **class)) {
                Some(class) => class,
                None => {
                    let (found, known) = (Value::Array(named.clone()), classes.join(" and "));
                    return Err(format!("architectures is {found}; only {known} can be read for model_type {kind}"));
                }
            },
            _ => usual,
        };
        if let Some(found) = keys.take("quantization_config") {
            return Err(format!("quantization_config is {found}; only models that are not quantised can be read"));
        }
        let mut warnings = Vec::new();
        let shape = match *class {
            class if class == VIT.1 => VisionShape::Vit(vit(&mut keys, &mut warnings)?),
            class if class == CLIP_VISION.1 => VisionShape::ClipVision(clip_vision(&mut keys, &mut warnings)?),
            class if class == CLIP_CLASSIFIER.1 => {
                let labels = classes_of(&mut keys)?;
                VisionShape::ClipClassifier(ClipClassifierConfig { clip: clip(&mut keys, &mut warnings)?, labels })
            }
            _ => VisionShape::Clip(clip(&mut keys, &mut warnings)?),
        };
        let checked = match &shape {
            VisionShape::Vit(config) => config.validate(),
            VisionShape::ClipVision(config) => config.validate(),
            VisionShape::Clip(config) => config.validate(),
            VisionShape::ClipClassifier(config) => config.validate(),
        };
        checked.map_err(|error| error.to_string())?;
        STALE.iter().for_each(|stale| drop(keys.map.remove(*stale)));
        Ok(Self { shape, extra: keys.map, warnings })
    }

    /// The text of `config.json` for weights of a type.
    pub fn to_json(&self, dtype: FileType) -> String {
        let mut map = self.extra.clone();
        let (kind, class) = match &self.shape {
            VisionShape::Vit(config) => {
                map.extend(encoder_keys(&config.encoder));
                map.extend(image_keys(&config.image));
                map.insert("qkv_bias".into(), json!(config.qkv_bias));
                map.extend(label_keys(&config.labels));
                VIT
            }
            VisionShape::ClipVision(config) => {
                map.extend(clip_vision_keys(config));
                CLIP_VISION
            }
            VisionShape::Clip(config) => {
                add_towers(config, &mut map);
                CLIP
            }
            VisionShape::ClipClassifier(config) => {
                add_towers(&config.clip, &mut map);
                map.extend(label_keys(&config.labels));
                CLIP_CLASSIFIER
            }
        };
        map.insert("model_type".into(), json!(kind));
        map.insert("architectures".into(), json!([class]));
        map.insert("dtype".into(), json!(dtype.torch_name()));
        format!("{:#}\n", Value::Object(map))
    }
}

/// Defaults of `transformers` for an encoder: hidden, intermediate, layers, heads.
type Usual = ([usize; 4], &'static str, f64);

fn encoder(keys: &mut Keys, (usual, act, eps): Usual, warnings: &mut Vec<String>) -> Result<EncoderConfig, String> {
    for key in DROPOUTS {
        if let Some(found) = keys.map.get(key)
            && found.as_f64() != Some(0.0)
            && !found.is_null()
        {
            warnings.push(format!("{key} is {found}; dropout inside the model is not applied in training"));
        }
    }
    let hidden_size = keys.count("hidden_size", Some(usual[0]))?;
    let num_attention_heads = keys.count("num_attention_heads", Some(usual[3]))?;
    if let Some(found) = keys.map.get("head_dim").and_then(Value::as_u64)
        && found * num_attention_heads as u64 != hidden_size as u64
    {
        return Err(format!("head_dim is {found}; only hidden_size / num_attention_heads is supported"));
    }
    let act = keys.take("hidden_act").unwrap_or_else(|| json!(act));
    let hidden_act: Gelu = serde_json::from_value(act.clone()).map_err(|_| {
        format!("hidden_act is {act}; gelu, gelu_new, gelu_pytorch_tanh, gelu_fast and quick_gelu are supported")
    })?;
    Ok(EncoderConfig {
        hidden_size,
        intermediate_size: keys.count("intermediate_size", Some(usual[1]))?,
        num_hidden_layers: keys.count("num_hidden_layers", Some(usual[2]))?,
        num_attention_heads,
        hidden_act,
        layer_norm_eps: keys.number("layer_norm_eps", eps)?,
        initializer_range: keys.number("initializer_range", 0.02)?,
    })
}

fn encoder_keys(config: &EncoderConfig) -> Map<String, Value> {
    object(serde_json::to_value(config))
}

fn image_keys(config: &ImageShape) -> Map<String, Value> {
    object(serde_json::to_value(config))
}

fn clip_vision_keys(config: &ClipVisionConfig) -> Map<String, Value> {
    let mut map = encoder_keys(&config.encoder);
    map.extend(image_keys(&config.image));
    map.insert("projection_dim".into(), json!(config.projection_dim));
    map
}

/// Writes the settings of both towers over those that are there.
fn add_towers(config: &ClipConfig, map: &mut Map<String, Value>) {
    let mut part = |key: &str, kind: &str, fields: Map<String, Value>| {
        let kept = map.get(key).and_then(Value::as_object).cloned().unwrap_or_default();
        let mut fields: Map<String, Value> = kept.into_iter().chain(fields).collect();
        fields.insert("model_type".into(), json!(kind));
        map.insert(key.into(), Value::Object(fields));
    };
    let mut text = encoder_keys(&config.text.encoder);
    text.insert("vocab_size".into(), json!(config.text.vocab_size));
    text.insert("max_position_embeddings".into(), json!(config.text.max_position_embeddings));
    text.insert("eos_token_id".into(), json!(config.text.eos_token_id));
    text.insert("projection_dim".into(), json!(config.vision.projection_dim));
    part("text_config", "clip_text_model", text);
    part("vision_config", CLIP_VISION.0, clip_vision_keys(&config.vision));
    map.insert("projection_dim".into(), json!(config.vision.projection_dim));
    map.insert("logit_scale_init_value".into(), json!(config.logit_scale_init_value));
}

/// Names of the classes by number, and numbers by name.
fn label_keys(labels: &[String]) -> [(String, Value); 2] {
    let numbered = labels.iter().enumerate();
    let names = numbered.clone().map(|(number, label)| (number.to_string(), json!(label)));
    let numbers = numbered.map(|(number, label)| (label.clone(), json!(number)));
    [("id2label".into(), Value::Object(names.collect())), ("label2id".into(), Value::Object(numbers.collect()))]
}

fn object(value: serde_json::Result<Value>) -> Map<String, Value> {
    match value {
        Ok(Value::Object(map)) => map,
        other => unreachable!("a struct of numbers and words is an object: {other:?}"),
    }
}

fn image(keys: &mut Keys, patch: usize) -> Result<ImageShape, String> {
    // A side may be given for both directions.
    for key in ["image_size", "patch_size"] {
        if let Some(Value::Array(sides)) = keys.map.get(key) {
            match sides.as_slice() {
                [height, width] if height == width => drop(keys.map.insert(key.into(), height.clone())),
                _ => return Err(format!("{key} is {}; only squares are supported", Value::Array(sides.clone()))),
            }
        }
    }
    Ok(ImageShape {
        image_size: keys.count("image_size", Some(224))?,
        patch_size: keys.count("patch_size", Some(patch))?,
        num_channels: keys.count("num_channels", Some(3))?,
    })
}

fn vit(keys: &mut Keys, warnings: &mut Vec<String>) -> Result<VitConfig, String> {
    let encoder = encoder(keys, ([768, 3072, 12, 12], "gelu", 1e-12), warnings)?;
    let labels = classes_of(keys)?;
    Ok(VitConfig { encoder, image: image(keys, 16)?, qkv_bias: keys.flag("qkv_bias", true)?, labels })
}

/// Names of the classes of a classifier.
fn classes_of(keys: &mut Keys) -> Result<Vec<String>, String> {
    if let Some(kind) = keys.map.get("problem_type")
        && !kind.is_null()
        && kind != "single_label_classification"
    {
        return Err(format!("problem_type is {kind}; only single_label_classification is supported"));
    }
    let names = keys.take("id2label");
    keys.map.remove("label2id");
    let count = keys.take("num_labels");
    match names {
        None => {
            let count = match count {
                None => 2,
                Some(count) => super::keys::whole("num_labels", &count)?,
            };
            Ok((0..count.min(1 << 20)).map(|number| format!("LABEL_{number}")).collect())
        }
        Some(Value::Object(names)) => labels(&names),
        Some(other) => Err(format!("id2label is {other}; it must be an object of numbers and names")),
    }
}

/// Names by number, from an object with the numbers as keys.
fn labels(names: &Map<String, Value>) -> Result<Vec<String>, String> {
    let label = |number: usize| {
        let name = names.get(&number.to_string());
        let name = name.ok_or_else(|| format!("id2label has {} names, but none for {number}", names.len()))?;
        name.as_str().map(str::to_string).ok_or_else(|| format!("id2label.{number} is {name}; it must be a text"))
    };
    (0..names.len()).map(label).collect()
}

fn clip_vision(keys: &mut Keys, warnings: &mut Vec<String>) -> Result<ClipVisionConfig, String> {
    Ok(ClipVisionConfig {
        encoder: encoder(keys, ([768, 3072, 12, 12], "quick_gelu", 1e-5), warnings)?,
        image: image(keys, 32)?,
        projection_dim: keys.count("projection_dim", Some(512))?,
    })
}

fn clip(keys: &mut Keys, warnings: &mut Vec<String>) -> Result<ClipConfig, String> {
    let mut part = |name: &str| -> Result<Keys, String> {
        // A second spelling of old files, which replaces the first.
        let old = keys.take(&format!("{name}_dict"));
        match old.or(keys.take(name)) {
            None => Ok(Keys { map: Map::new() }),
            Some(Value::Object(map)) => Ok(Keys { map }),
            Some(other) => Err(format!("{name} is {other}; it must be an object")),
        }
    };
    let (mut text, mut vision) = (part("text_config")?, part("vision_config")?);
    let under = |name: &'static str| move |reason: String| format!("{name}.{reason}");
    let text_config = (|| {
        let usual = ClipTextConfig::default();
        let eos = text.count("eos_token_id", Some(usual.eos_token_id as usize))?;
        Ok(ClipTextConfig {
            encoder: encoder(&mut text, ([512, 2048, 12, 8], "quick_gelu", 1e-5), warnings)?,
            vocab_size: text.count("vocab_size", Some(usual.vocab_size))?,
            max_position_embeddings: text.count("max_position_embeddings", Some(usual.max_position_embeddings))?,
            eos_token_id: i32::try_from(eos).map_err(|_| format!("eos_token_id is {eos}; it is no token"))?,
        })
    })();
    let text_config = text_config.map_err(under("text_config"))?;
    let vision_config = clip_vision(&mut vision, warnings).map_err(under("vision_config"))?;
    // The projections of a whole model have the width that stands outside.
    let projection_dim = keys.count("projection_dim", Some(512))?;
    for (name, part) in [("text_config", &mut text), ("vision_config", &mut vision)] {
        // The width stands outside.
        for stale in STALE.iter().chain(&["model_type", "projection_dim"]) {
            part.map.remove(*stale);
        }
        keys.map.insert(name.into(), Value::Object(std::mem::take(&mut part.map)));
    }
    Ok(ClipConfig {
        vision: ClipVisionConfig { projection_dim, ..vision_config },
        text: text_config,
        logit_scale_init_value: keys.number("logit_scale_init_value", ClipConfig::LOGIT_SCALE)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(value: &Value) -> Result<VisionHub, String> {
        VisionHub::parse(&value.to_string())
    }

    #[test]
    fn missing_keys_take_the_values_of_transformers_and_all_are_read_back() {
        for (kind, width) in [("vit", 768), ("clip_vision_model", 768), ("clip", 768)] {
            let hub = parse(&json!({"model_type": kind, "future": [1]})).unwrap();
            let encoder = match &hub.shape {
                VisionShape::Vit(config) => &config.encoder,
                VisionShape::ClipVision(config) => &config.encoder,
                VisionShape::Clip(config) => &config.vision.encoder,
                VisionShape::ClipClassifier(config) => &config.clip.vision.encoder,
            };
            assert_eq!(encoder.hidden_size, width);
            assert_eq!(hub.extra["future"], json!([1]));
            assert_eq!(VisionHub::parse(&hub.to_json(FileType::F32)).unwrap(), hub, "{kind}");
        }
        let old = parse(
            &json!({"model_type": "clip", "text_config": {"hidden_size": 9}, "text_config_dict": {"hidden_size": 16}}),
        );
        let named = parse(
            &json!({"model_type": "clip", "architectures": ["CLIPForImageClassification"], "id2label": {"0": "a"}}),
        );
        let named = named.unwrap();
        assert!(matches!(&named.shape, VisionShape::ClipClassifier(config) if config.labels == ["a"]));
        assert_eq!(VisionHub::parse(&named.to_json(FileType::F32)).unwrap(), named);
        let VisionShape::Clip(old) = old.unwrap().shape else { unreachable!("it is a CLIP") };
        assert_eq!((old.text.encoder.hidden_size, old.text.vocab_size), (16, 49_408));
        let VisionShape::Vit(vit) =
            parse(&json!({"model_type": "vit", "id2label": {"1": "b", "0": "a"}})).unwrap().shape
        else {
            unreachable!("it is a ViT")
        };
        assert_eq!(vit.labels, ["a", "b"]);
    }

    #[test]
    fn what_is_not_supported_is_refused_by_its_key() {
        for (config, part) in [
            (json!({"model_type": "swin"}), "model_type"),
            (json!({"model_type": "vit", "architectures": ["ViTModel"]}), "ViTForImageClassification"),
            (json!({"model_type": "vit", "hidden_act": "relu"}), "hidden_act"),
            (json!({"model_type": "vit", "image_size": [224, 192]}), "image_size"),
            (json!({"model_type": "vit", "problem_type": "regression"}), "problem_type"),
            (json!({"model_type": "vit", "id2label": {"0": "a", "2": "c"}}), "id2label"),
            (json!({"model_type": "vit", "quantization_config": {"bits": 4}}), "quantization_config"),
            (json!({"model_type": "vit", "num_attention_heads": 5}), "num_attention_heads"),
            (json!({"model_type": "clip", "text_config": {"hidden_size": "wide"}}), "text_config.hidden_size"),
            (json!({"model_type": "clip", "vision_config": 3}), "vision_config"),
        ] {
            let reason = parse(&config).unwrap_err();
            assert!(reason.contains(part), "{config}: {reason}");
        }
        let hub = parse(&json!({"model_type": "vit", "hidden_dropout_prob": 0.1})).unwrap();
        assert!(hub.warnings[0].contains("hidden_dropout_prob"));
    }
}
