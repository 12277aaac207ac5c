//! Writing of AdaLoRA folders ("Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", arXiv 2303.10512).

use std::collections::BTreeMap;
use std::path::Path;

use burn::module::Module;
use burn::tensor::{Device, Tensor, TensorData};
use serde_json::{Map, Value, json};

use super::folder::{CONFIG, MODEL, Mark, WEIGHTS, adapter_dir, attached, digits};
use super::write::write_tensors;
use crate::error::ModelError;
use lowrank_adapters::{Adapter, AdapterError, Factors, base_fingerprint};

/// Number that `peft` adds to the rank in the divisor of the scale.
const BESIDE_RANK: f64 = 1e-5;

/// The components of a layer that are left.
struct Triplets {
    /// Their numbers.
    kept: Vec<usize>,
    /// `alpha / (rank + 1e-5)` with the rank that the layer began with.
    scale: f64,
    /// `[kept, d_in]`, `[kept, 1]` and `[d_out, kept]`.
    tensors: [Tensor<2>; 3],
}

/// Writes an adapter of the structure `triplet` as an AdaLoRA folder of `peft` that holds the components that are left. `base_model` is noted as the
/// model it belongs to. Other structures are rejected.
pub fn save_adalora<M: Module>(module: &M, name: &str, base_model: Option<&str>, dir: &Path) -> Result<(), ModelError> {
    let dir = adapter_dir(dir, "default")?;
    let layers = attached(module, name);
    let Some(config) = layers.values().next().map(|layer| layer.control().config()) else {
        return Err(AdapterError::Refused(format!("the model has no adapter \"{name}\"")).into());
    };
    let triplets = layers.iter().map(|(path, layer)| Ok((path.as_str(), Triplets::of(path, layer)?)));
    let triplets = triplets.collect::<Result<BTreeMap<&str, Triplets>, ModelError>>()?;
    let alpha = layers.values().next().map_or(1.0, |layer| layer.place().alpha);
    let begun = layers.values().map(|layer| layer.place().rank).max().unwrap_or(0).max(config.rank.unwrap_or(1));
    let scale = alpha / (begun as f64 + BESIDE_RANK);
    let (mut tensors, mut masks, mut left) = (BTreeMap::new(), Map::new(), 0);
    for (path, Triplets { kept, scale: own, tensors: [a, e, b] }) in triplets {
        // One scale for all layers: the values take the difference.
        let ratio = own / scale;
        let e = if (ratio - 1.0).abs() < 1e-12 { e } else { e.mul_scalar(ratio) };
        for (name, tensor) in [("lora_A", a), ("lora_E", e), ("lora_B", b)] {
            tensors.insert(format!("{MODEL}{path}.{name}"), tensor.into_data());
        }
        let mask: Vec<bool> = (0..begun).map(|component| kept.contains(&component)).collect();
        masks.insert(format!("{path}.lora_E"), json!(mask));
        left += kept.len();
    }
    let text = json!({
        "auto_mapping": null, "base_model_name_or_path": base_model, "beta1": 0.85, "beta2": 0.85, "bias": "none", "deltaT": 1,
        "exclude_modules": null, "fan_in_fan_out": false, "inference_mode": true, "init_lora_weights": true, "init_r": begun,
        "layers_pattern": null, "layers_to_transform": null, "lora_alpha": alpha, "lora_dropout": config.dropout, "modules_to_save": null,
        "orth_reg_weight": 0.5, "peft_type": "ADALORA", "r": 8, "rank_pattern": Value::Object(masks), "revision": null,
        "target_modules": layers.keys().collect::<Vec<_>>(), "target_r": left.div_ceil(layers.len()).max(1), "task_type": "CAUSAL_LM",
        "tfinal": 0, "tinit": 0, "total_step": 1, "use_dora": false, "use_rslora": false,
    });
    let base = Some(digits(base_fingerprint(module, &layers.keys().cloned().collect())));
    std::fs::create_dir_all(&dir).map_err(ModelError::io(&dir))?;
    write_tensors(&dir.join(WEIGHTS), tensors, &Mark { base, ..Mark::default() })?;
    let path = dir.join(CONFIG);
    std::fs::write(&path, format!("{text:#}\n")).map_err(ModelError::io(path))
}

impl Triplets {
    fn of(path: &str, layer: &Adapter) -> Result<Self, ModelError> {
        let structure = layer.control().config().structure.clone();
        let kept = layer.structure().active_components().filter(|_| structure == "triplet");
        let (Some(kept), Some(Factors { scale, .. })) = (kept, layer.structure().factors()) else {
            let reason = format!("{path}: {structure} has no values between its factors; use --as lora");
            return Err(AdapterError::Refused(reason).into());
        };
        if layer.place().embedding {
            let reason = format!("{path} is an embedding, which AdaLoRA of peft cannot adapt; use --as lora");
            return Err(AdapterError::Refused(reason).into());
        }
        let all: BTreeMap<String, TensorData> =
            layer.tensors().into_iter().map(|(tensor, data)| (tensor.field, data)).collect();
        let blocks = |field: &str| {
            let block = |number: usize| all.get(&format!("{field}.{number}")).cloned();
            (0..).map_while(block).collect::<Vec<TensorData>>()
        };
        let device = Device::default();
        let matrices = |field: &str, dim: usize| {
            let blocks = blocks(field).into_iter().filter(|data| data.num_elements() > 0);
            let blocks: Vec<Tensor<2>> = blocks.map(|data| Tensor::from_data(data, &device)).collect();
            if blocks.is_empty() { None } else { Some(Tensor::cat(blocks, dim)) }
        };
        let values: Vec<Tensor<1>> = blocks("e")
            .into_iter()
            .filter(|data| data.num_elements() > 0)
            .map(|data| Tensor::from_data(data, &device))
            .collect();
        let place = layer.place();
        let [d_in, d_out] = place.shape;
        let chosen: Vec<i32> = kept.iter().map(|number| *number as i32).collect();
        let tensors = match (matrices("a", 0), matrices("b", 1)) {
            (Some(a), Some(b)) if !chosen.is_empty() => {
                let chosen = Tensor::from_data(TensorData::from(chosen.as_slice()), &device);
                let e = Tensor::cat(values, 0).unsqueeze_dim::<2>(1);
                [a.select(0, chosen.clone()), e.select(0, chosen.clone()), b.select(1, chosen)]
            }
            _ => [[0, d_in], [0, 1], [d_out, 0]]
                .map(|shape| Tensor::from_data(TensorData::new(Vec::<f32>::new(), shape), &device)),
        };
        Ok(Self { kept, scale, tensors })
    }
}
