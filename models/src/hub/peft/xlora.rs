//! Mixtures of LoRA adapters with a classifier ("X-LoRA: Mixture of Low-Rank Adapter Experts, a Flexible Framework for Large Language Models
//! with Applications in Protein Mechanics and Molecular Design", arXiv 2402.07148), as `peft` stores them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use burn::tensor::activation::{relu, softmax};
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use serde::Deserialize;

use super::folder::{CONFIG, WEIGHTS};
use super::read::PeftFolder;
use crate::error::ModelError;
use crate::hub::TensorFiles;
use crate::hub::open::read_text;
use crate::llama::{Llama, Sampling, generate_by, ids_tensor};
use lowrank_adapters::Control;

/// Name of the type in configurations.
const TYPE: &str = "XLORA";
/// Names of the classifier's tensors.
const CLASSIFIER: &str = "base_model.internal_xlora_classifier.layers.";

/// A model with several LoRA adapters, each weighted for every token and layer by a classifier that reads the last hidden states of the model
/// without them: two passes.
#[derive(Clone, Debug)]
pub struct XLora {
    model: Llama,
    experts: Vec<Control>,
    /// Paths of the layers that any expert adapts, in the order of the model.
    layers: Vec<String>,
    /// Weight `[d_in, d_out]` and bias `[d_out]` of each layer of the classifier.
    classifier: Vec<(Tensor<2>, Tensor<1>)>,
    settings: Settings,
}

/// Settings of the mixture, with the defaults of `peft`.
#[derive(Clone, Debug, Deserialize)]
struct Settings {
    adapters: BTreeMap<String, PathBuf>,
    #[serde(default = "yes")]
    enable_softmax: bool,
    #[serde(default)]
    enable_softmax_topk: bool,
    #[serde(default)]
    layerwise_scalings: bool,
    #[serde(default = "one")]
    softmax_temperature: f64,
    top_k_lora: Option<usize>,
    #[serde(default = "one")]
    global_scaling_weight: f64,
}

fn yes() -> bool {
    true
}

fn one() -> f64 {
    1.0
}

impl XLora {
    /// Returns true if a folder holds such a mixture.
    pub fn is_in(dir: &Path) -> bool {
        let text = read_text(&dir.join(CONFIG)).unwrap_or_default();
        let config: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
        config["peft_type"] == TYPE
    }

    /// Reads the classifier and the experts of a folder, whose names are those of sub-folders, and attaches the experts to a model.
    pub fn open(dir: &Path, mut model: Llama) -> Result<Self, ModelError> {
        let path = dir.join(CONFIG);
        let bad = |reason: String| ModelError::File { path: path.clone(), reason };
        let settings: Settings = serde_json::from_str(&read_text(&path)?).map_err(|error| bad(error.to_string()))?;
        let count = settings.adapters.len();
        if count == 0 || settings.top_k_lora.is_some_and(|most| most == 0 || most > count) {
            return Err(bad(format!("adapters names {count} experts and top_k_lora is {:?}", settings.top_k_lora)));
        }
        if settings.softmax_temperature <= 0.0 {
            return Err(bad(format!("softmax_temperature is {}; it must be above 0", settings.softmax_temperature)));
        }
        // Experts are numbered; a map of JSON may have them in any order.
        let mut experts: Vec<(&String, &PathBuf)> = settings.adapters.iter().collect();
        experts.sort_by_key(|(name, _)| (name.parse::<usize>().unwrap_or(usize::MAX), name.as_str()));
        let (mut controls, mut adapted) = (Vec::new(), BTreeSet::new());
        for (name, folder) in experts {
            let folder = PeftFolder::open(&dir.join(folder))?.named(&format!("expert {name}"));
            if folder.config.structure != "lora" {
                let reason =
                    format!("expert {name} is {}; a mixture has experts of LoRA alone", folder.config.structure);
                return Err(bad(reason));
            }
            let (with, report) = folder.attach(model)?;
            if let Some(layer) = report.layers.iter().find(|layer| layer.place.embedding) {
                return Err(bad(format!("expert {name} adapts {}; an embedding cannot be mixed", layer.place.path)));
            }
            adapted.extend(report.layers.iter().map(|layer| layer.place.path.clone()));
            controls.push(report.control);
            model = with;
        }
        let blocks = model.model.layers.iter().enumerate();
        let inner =
            blocks.flat_map(|(number, block)| block.linears().map(|(name, _)| format!("model.layers.{number}.{name}")));
        let layers: Vec<String> = inner.chain(["lm_head".to_string()]).filter(|path| adapted.contains(path)).collect();
        let outputs = count * if settings.layerwise_scalings { layers.len() } else { 1 };
        let device = model.model.embed_tokens.weight.device().inner();
        let classifier = classifier(&dir.join(WEIGHTS), [model.config().hidden_size, outputs], &device)?;
        Ok(Self { model, experts: controls, layers, classifier, settings })
    }

    /// The model with its experts.
    pub fn model(&self) -> &Llama {
        &self.model
    }

    /// Paths of the weighted layers, in the order of [`XLora::scalings`].
    pub fn layers(&self) -> &[String] {
        &self.layers
    }

    /// Weights `[batch, positions, layers, experts]` for token ids `[batch, positions]`, before the choice of the largest.
    pub fn scalings(&self, ids: Tensor<2, Int>) -> Tensor<4> {
        let [batch, positions] = ids.dims();
        self.experts.iter().for_each(|expert| expert.switch(false));
        let hidden = self.model.hidden(ids, None);
        self.experts.iter().for_each(|expert| expert.switch(true));
        let [_, _, width] = hidden.dims();
        let last = self.classifier.len() - 1;
        let mut x = hidden.reshape([batch * positions, width]);
        for (number, (weight, bias)) in self.classifier.iter().enumerate() {
            x = x.matmul(weight.clone()) + bias.clone().unsqueeze();
            x = if number < last { relu(x) } else { x };
        }
        let (layers, experts) = (self.layers.len(), self.experts.len());
        let scores = match self.settings.layerwise_scalings {
            true => x.reshape([batch, positions, layers, experts]),
            false => x.reshape([batch, positions, 1, experts]).repeat_dim(2, layers),
        };
        match self.settings.enable_softmax {
            true => softmax(scores.div_scalar(self.settings.softmax_temperature), 3),
            false => scores,
        }
    }

    /// Logits `[batch, positions, vocab_size]` of token ids `[batch, positions]`.
    pub fn logits(&self, ids: Tensor<2, Int>) -> Tensor<3> {
        let [batch, positions] = ids.dims();
        let scalings = self.chosen(self.scalings(ids.clone())).mul_scalar(self.settings.global_scaling_weight);
        for (number, expert) in self.experts.iter().enumerate() {
            let weights = self.layers.iter().enumerate().map(|(layer, path)| {
                let own = scalings.clone().slice([0..batch, 0..positions, layer..layer + 1, number..number + 1]);
                (path.clone(), own.reshape([batch * positions, 1]))
            });
            expert.weigh(Some(Arc::new(weights.collect())));
        }
        let logits = self.model.logits(ids, None);
        self.experts.iter().for_each(|expert| expert.weigh(None));
        logits
    }

    /// Continues `prompt` as [`generate`](crate::generate) does. Every token takes two passes over all tokens before it: the weights of a mixture
    /// depend on hidden states of the model without it.
    pub fn generate(
        &self,
        prompt: &[i32],
        tokens: usize,
        sampling: &Sampling,
        each: impl FnMut(i32) -> bool,
    ) -> Result<Vec<i32>, ModelError> {
        let device = self.model.model.embed_tokens.weight.val().device();
        let mut all = Vec::new();
        let next = |input: &[i32]| {
            all.extend_from_slice(input);
            let logits = self.logits(ids_tensor(&all, 1, &device));
            let [_, positions, vocabulary] = logits.dims();
            logits.slice([0..1, positions - 1..positions]).reshape([1, vocabulary])
        };
        generate_by(&self.model, prompt, tokens, sampling, next, each)
    }

    /// The weights with all but the largest at zero, and those that are left normalised if the settings ask for it.
    fn chosen(&self, scalings: Tensor<4>) -> Tensor<4> {
        let [.., experts] = scalings.dims();
        let scalings = match self.settings.top_k_lora {
            Some(most) if most < experts => {
                let least = scalings.clone().topk(most, 3).min_dim(3);
                scalings.clone().mask_fill(scalings.lower(least), 0.0)
            }
            _ => scalings,
        };
        match self.settings.enable_softmax_topk {
            true => {
                let none = scalings.clone().equal_elem(0.0);
                softmax(scalings.mask_fill(none.clone(), f32::NEG_INFINITY), 3).mask_fill(none, 0.0)
            }
            false => scalings,
        }
    }
}

/// Reads the layers of the classifier, which goes from the hidden size to the number of weights.
fn classifier(
    path: &Path,
    [inputs, outputs]: [usize; 2],
    device: &Device,
) -> Result<Vec<(Tensor<2>, Tensor<1>)>, ModelError> {
    let (mut files, _) = TensorFiles::of_file(path)?;
    let shapes: BTreeMap<String, Vec<usize>> =
        files.shapes().map(|(name, shape)| (name.to_string(), shape.to_vec())).collect();
    let numbers: BTreeSet<usize> =
        shapes.keys().filter_map(|name| name.strip_prefix(CLASSIFIER)?.split('.').next()?.parse().ok()).collect();
    let (mut layers, mut width) = (Vec::new(), inputs);
    for number in numbers {
        let [weight, bias] = ["weight", "bias"].map(|part| format!("{CLASSIFIER}{number}.{part}"));
        let d_out = shapes.get(&weight).and_then(|shape| shape.first()).copied().unwrap_or(0);
        let (weight, bias) = (files.take(&weight, &[d_out, width])?, files.take(&bias, &[d_out])?);
        let weight = Tensor::<2>::from_data(TensorData::new(weight, [d_out, width]), (device, DType::F32));
        let bias = Tensor::<1>::from_data(TensorData::new(bias, [d_out]), (device, DType::F32));
        layers.push((weight.transpose(), bias));
        width = d_out;
    }
    match width == outputs && !layers.is_empty() {
        true => Ok(layers),
        false => Err(ModelError::File {
            path: path.to_path_buf(),
            reason: format!(
                "the classifier has {} layers and gives {width} weights; the experts and their layers ask for {outputs}",
                layers.len()
            ),
        }),
    }
}
