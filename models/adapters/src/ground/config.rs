//! Configuration of an adapter: structure, initialisation, scaling and training rule are separate choices.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::targets::Targets;

/// Scale of the update.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Scaling {
    /// `alpha / rank` ("LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685).
    #[default]
    Rank,
    /// `alpha / sqrt(rank)` ("A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", arXiv 2312.03732).
    RootRank,
}

/// Biases that are trained in addition to the adapter and stored with it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum TrainedBiases {
    /// None.
    #[default]
    None,
    /// Those of the adapted layers.
    Adapted,
    /// All biases of the model.
    All,
}

/// Options of a structure by name.
pub type AdapterOptions = Map<String, Value>;

/// An adapter to attach.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterConfig {
    /// Name that distinguishes it from other adapters on the same model.
    pub name: String,
    /// Structure, by its name in the registry.
    pub structure: String,
    /// Rank; the method's own when none.
    pub rank: Option<usize>,
    /// Numerator of the scale; the method's own when none.
    pub alpha: Option<f64>,
    /// Divisor of alpha; the method's own when none.
    pub scaling: Option<Scaling>,
    /// Fraction of the branches' inputs that is dropped in training.
    pub dropout: f64,
    /// Initialisation: `default`, or another one that the structure supports.
    pub init: String,
    /// Layers to adapt.
    pub targets: Targets,
    /// Layers to leave out.
    pub exclude: Option<Targets>,
    /// Modules that are trained whole in addition to the adapter and stored with it, by the ends of their paths.
    pub modules_to_save: Vec<String>,
    /// Rows of tables that are stored with the adapter, by the end of the module's path.
    pub token_rows: Vec<(String, Vec<usize>)>,
    /// Biases that are trained in addition to the adapter and stored with it.
    pub bias: TrainedBiases,
    /// Numbers of the blocks to adapt; all when none.
    pub layers: Option<Vec<usize>>,
    /// Ranks of layers whose names match; the first match counts.
    pub rank_pattern: Vec<(String, usize)>,
    /// Alphas of layers whose names match; the first match counts.
    pub alpha_pattern: Vec<(String, f64)>,
    /// Seed of all random draws.
    pub seed: u64,
    /// Options of the structure.
    pub options: AdapterOptions,
}

impl Default for AdapterConfig {
    fn default() -> Self {
        Self {
            name: "default".into(),
            structure: "lora".into(),
            rank: None,
            alpha: None,
            scaling: None,
            dropout: 0.0,
            init: "default".into(),
            targets: Targets::AllLinear,
            exclude: None,
            modules_to_save: Vec::new(),
            token_rows: Vec::new(),
            bias: TrainedBiases::None,
            layers: None,
            rank_pattern: Vec::new(),
            alpha_pattern: Vec::new(),
            seed: 0,
            options: AdapterOptions::new(),
        }
    }
}

impl AdapterConfig {
    /// Creates a configuration of a structure with its defaults on all linear layers.
    pub fn new(structure: &str) -> Self {
        Self { structure: structure.into(), ..Self::default() }
    }

    /// Sets the rank.
    pub fn with_rank(self, rank: usize) -> Self {
        Self { rank: Some(rank), ..self }
    }

    /// Sets alpha.
    pub fn with_alpha(self, alpha: f64) -> Self {
        Self { alpha: Some(alpha), ..self }
    }

    /// Sets the layers to adapt.
    pub fn with_targets(self, targets: Targets) -> Self {
        Self { targets, ..self }
    }

    /// Sets an option of the structure.
    pub fn with_option(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.options.insert(name.into(), value.into());
        self
    }
}
