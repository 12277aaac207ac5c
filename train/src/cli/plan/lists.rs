//! Values of the flags that a plan takes several of.

use crate::build::BuildError;
use crate::config::{Config, Job, Layers};
use crate::plan::{Freedom, mode};

/// Values that a search is narrowed to; none of a flag that was not given.
#[derive(Debug, clap::Args)]
pub struct Lists {
    /// Optimizer, see `lowrank methods`; several, by commas or again, narrow the search to them
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    optimizer: Vec<String>,
    /// Parameterization of the linear layers, see `lowrank methods`; one or several
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    parameterization: Vec<String>,
    /// whole; checkpointed (less memory, more time); per-layer (each block is updated at once); one or several
    #[arg(long, value_name = "MODE", value_delimiter = ',')]
    backward: Vec<String>,
    /// Storage of trained weights: f32, bf16, bf16-kahan, 24bit or int8; one or several
    #[arg(long, value_name = "STORAGE", value_delimiter = ',')]
    weights: Vec<String>,
    /// With --finetune: storage of the frozen weights: file, f32, bf16, int8 or nf4; one or several
    #[arg(long, value_name = "STORAGE", value_delimiter = ',', requires = "finetune")]
    base: Vec<String>,
    /// With --finetune: structure of the adapter, or none for all weights; one or several
    #[arg(long, value_name = "NAME", value_delimiter = ',', requires = "finetune")]
    adapter: Vec<String>,
}

impl Lists {
    /// Adds the values to the layers, which they are checked against, and returns what they leave free.
    ///
    /// One value fixes its setting. Of several methods the first is where the search starts, with the options that are set; several modes
    /// and storages leave the setting free.
    pub fn add(&self, layers: &mut Layers, job: Job) -> Result<Freedom, BuildError> {
        let methods = [
            ("--optimizer", "optimizer.name", &self.optimizer),
            ("--parameterization", "model.parameterization.name", &self.parameterization),
        ];
        let values = [
            ("--backward", "train.backward", &self.backward),
            ("--weights", "weights.storage", &self.weights),
            ("--base", "weights.base", &self.base),
        ];
        for (flag, key, list) in methods.iter().chain(&values) {
            for value in list.iter().filter(|_| list.len() > 1) {
                // The value alone is in question here; the search finds what it goes with.
                let mut alone = Layers::default();
                alone.flag(flag, key, value.as_str());
                alone.flag(flag, "optimizer.clip", 0.0);
                alone.flag(flag, "train.max_skipped_steps", 0);
                alone.resolve(&Config::of(job))?;
            }
        }
        for (flag, key, list) in &values {
            if let [value] = list.as_slice() {
                layers.flag(flag, key, value.as_str());
            }
        }
        let before = Freedom::of(layers, job);
        for (flag, key, list) in &methods {
            layers.optional(flag, key, list.first().map(String::as_str));
        }
        let freedom = Freedom::of(layers, job);
        Ok(Freedom {
            optimizer: freedom.optimizer || before.optimizer && self.optimizer.len() > 1,
            parameterization: freedom.parameterization || before.parameterization && self.parameterization.len() > 1,
            everything: true,
            ..freedom
        })
    }

    /// Adapters to plan for; a single none stands for that of the configuration.
    pub fn adapters(&self) -> Vec<Option<&str>> {
        match self.adapter.as_slice() {
            [] => vec![None],
            names => names.iter().map(|name| Some(name.as_str())).collect(),
        }
    }

    /// Returns true if there are several adapters.
    pub fn several_adapters(&self) -> bool {
        self.adapter.len() > 1
    }

    /// Returns true if a flag has several values, which a run cannot have.
    pub fn several(&self) -> bool {
        let lists = [&self.optimizer, &self.parameterization, &self.backward, &self.weights, &self.base, &self.adapter];
        lists.iter().any(|list| list.len() > 1)
    }

    /// Returns true if the values of a configuration are among those given.
    pub fn admit(&self, config: &Config) -> bool {
        let among = |list: &[String], value: &str| list.is_empty() || list.iter().any(|listed| listed == value);
        among(&self.optimizer, &config.optimizer.name)
            && among(&self.parameterization, &config.model.parameterization.name)
            && among(&self.backward, mode(config.train.backward))
            && among(&self.weights, config.weights.storage.name())
            && among(&self.base, config.weights.base.name())
    }

    /// The values of a configuration that were asked for side by side.
    pub fn group(&self, config: &Config) -> [Option<String>; 6] {
        let of = |list: &[String], value: &str| (list.len() > 1).then(|| value.to_string());
        [
            of(&self.adapter, &config.adapter.name),
            of(&self.optimizer, &config.optimizer.name),
            of(&self.parameterization, &config.model.parameterization.name),
            of(&self.backward, mode(config.train.backward)),
            of(&self.weights, config.weights.storage.name()),
            of(&self.base, config.weights.base.name()),
        ]
    }
}
