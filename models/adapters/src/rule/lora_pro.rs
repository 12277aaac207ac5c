//! LoRA-Pro: the update follows the full gradient ("LoRA-Pro: Are Low-Rank Adapters Properly Optimized?", arXiv 2407.18242).

use lowrank_optim::registry::{Entry, Kind, OptionList, Options, Paper};
use lowrank_optim::rules::{GradientRule, LoraProConfig, LoraProMode, LoraProX};
use lowrank_optim::{Parameter, Part, Role, StateMeter};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::definition::{Rule, RuleEntry, of_lora, read, refusal, refused, with_adamw};
use super::pairs::trained_pairs;
use crate::ground::config::AdapterConfig;
use crate::ground::error::AdapterError;
use crate::ground::spec::TensorRole;
use crate::ground::stack::each_adapter;

pub(super) static ENTRY: RuleEntry = RuleEntry {
    entry: Entry {
        papers: &[Paper { title: "LoRA-Pro: Are Low-Rank Adapters Properly Optimized?", place: "2407.18242" }],
        memory: "mode full: 2 d_in d_out values of each adapted weight",
        // Learning rates of full fine-tuning are suitable.
        lr: Some(2e-5),
        options: || OptionList::of(&LoraProRule::default()),
        ..Entry::plain(Kind::Rule, "lora-pro", "gradients whose common update lies closest to the full gradient")
    },
    read: |options| read::<LoraProRule>(&ENTRY, options),
};

/// Training rule LoRA-Pro.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LoraProRule {
    /// Place of the moments: full (as for the whole weight), efficient (on the factors), sgd (none).
    pub mode: LoraProMode,
    /// Use of the free part of the gradients.
    pub x_mode: LoraProX,
    /// Damping of the factors' products with themselves.
    #[schemars(range(max = 1e6), extend("exclusiveMinimum" = 0.0))]
    pub delta: f64,
}

impl Default for LoraProRule {
    fn default() -> Self {
        Self { mode: LoraProMode::default(), x_mode: LoraProX::default(), delta: 1e-8 }
    }
}

impl Rule for LoraProRule {
    fn entry(&self) -> &'static RuleEntry {
        &ENTRY
    }

    fn prepare(&self, config: AdapterConfig) -> Result<AdapterConfig, AdapterError> {
        if !(self.delta > 0.0 && self.delta.is_finite()) {
            return refused("rule.options.delta", self.delta, "it must be greater than 0");
        }
        of_lora(self, &config, "it needs gradients of A and B that are those of a plain product")?;
        Ok(config)
    }

    fn warnings(&self, config: &AdapterConfig) -> Vec<String> {
        match config.dropout {
            dropout if dropout > 0.0 => vec![format!(
                "lora-pro with dropout {dropout}: the gradients of the factors follow from that of the weight in the mean only"
            )],
            _ => Vec::new(),
        }
    }

    fn options(&self, method: &str, mut options: Options) -> Result<Options, AdapterError> {
        with_adamw(self, method, "whose moments are those of Adam")?;
        options.entry("beta_2").or_insert(0.999.into());
        if let (LoraProMode::Sgd, Some(decay)) = (self.mode, decay(&options)) {
            return refused(
                "optimizer.weight_decay",
                decay,
                "rule lora-pro in mode sgd takes steps along the gradients alone; set it to 0",
            );
        }
        if self.mode != LoraProMode::Efficient {
            for key in ["legacy_epsilon", "decay_after", "lr_scale"] {
                if let Some(value) = options.get(key) {
                    let reason = "rule lora-pro steps the factors itself, and has no such option; remove it";
                    return refused(&format!("optimizer.options.{key}"), value, reason);
                }
            }
        }
        Ok(options)
    }

    fn check_adapter_alone(&self, options: &Options) -> Result<(), AdapterError> {
        match decay(options) {
            Some(decay) if self.mode == LoraProMode::Full => refused(
                "optimizer.weight_decay",
                decay,
                "with rule lora-pro in mode full it would shrink the weights below the adapter, and a checkpoint holds the adapter alone; set it to 0, or rule.options.mode to efficient",
            ),
            _ => Ok(()),
        }
    }

    fn tune(&self, parameter: &mut Parameter, role: Option<TensorRole>) {
        // In the other modes the gradients of the rule are already the updates.
        if self.mode != LoraProMode::Efficient && matches!(role, Some(TensorRole::A | TensorRole::B)) {
            parameter.role = Role::Descent;
        }
    }

    fn gradients(
        &self,
        part: &dyn Part,
        options: &Options,
        meter: &StateMeter,
    ) -> Result<Option<Box<dyn GradientRule>>, AdapterError> {
        let Self { mode, x_mode, delta } = *self;
        let mut config = LoraProConfig::new().with_mode(mode).with_x_mode(x_mode).with_delta(delta);
        if mode == LoraProMode::Full {
            let given = |key: &str| options.get(key).and_then(serde_json::Value::as_f64);
            let adam = &mut config.adam;
            adam.beta_1 = given("beta_1").unwrap_or(adam.beta_1);
            adam.beta_2 = given("beta_2").unwrap_or(adam.beta_2);
            adam.epsilon = given("epsilon").unwrap_or(adam.epsilon);
            adam.weight_decay = given("weight_decay").unwrap_or(adam.weight_decay);
        }
        let pairs = trained_pairs(self, part, true)?;
        let rule = config.over(part, pairs, meter).map_err(refusal)?;
        if config.adam.weight_decay > 0.0 {
            refuse_parts(part, config.adam.weight_decay)?;
        }
        Ok(Some(Box::new(rule)))
    }

    fn state_bytes(&self, [d_in, d_out]: [usize; 2]) -> usize {
        if self.mode == LoraProMode::Full { 8 * d_in * d_out } else { 0 }
    }
}

/// Configured weight decay, if it is not 0.
fn decay(options: &Options) -> Option<&serde_json::Value> {
    options.get("weight_decay").filter(|decay| decay.as_f64() != Some(0.0))
}

/// Rejects decay of the whole weight if it consists of more than a base and one product.
fn refuse_parts(part: &dyn Part, decay: f64) -> Result<(), AdapterError> {
    let mut found = None;
    each_adapter(part, |path, adapter| {
        if adapter.stack.len() > 1 || adapter.stack.iter().any(|attached| attached.origin.is_some()) {
            found = Some(path.to_string());
        }
    });
    match found {
        None => Ok(()),
        Some(path) => refused(
            "optimizer.weight_decay",
            decay,
            format!("lora-pro decays the weight and one product, and {path} has more parts; set it to 0"),
        ),
    }
}
