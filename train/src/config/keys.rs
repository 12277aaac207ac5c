//! Keys of the configuration, read off the fields of its sections.

use lowrank_optim::registry::{OptionList, OptionSpec};

use super::{Config, Job};

/// One key: a field of a section.
#[derive(Clone, Debug)]
pub struct Key {
    /// Key as `section.key`.
    pub name: String,
    /// Default, documentation and allowed values.
    pub option: OptionSpec,
}

/// One section.
#[derive(Clone, Debug)]
pub struct Section {
    /// Name of the section.
    pub name: &'static str,
    /// One-line description.
    pub help: String,
    /// Keys, in the order of its fields.
    pub keys: Vec<Key>,
}

/// Sections with the defaults of a job, without the keys that the job does not support.
pub fn sections(job: Job) -> Vec<Section> {
    let config = Config::of(job);
    macro_rules! sections {
        ($($name:ident),*) => { vec![$( section(job, stringify!($name), OptionList::of(&config.$name)) ),*] };
    }
    let mut all = sections!(
        run, model, weights, adapter, rule, allocation, penalty, data, tokenizer, optimizer, schedule, train, eval,
        checkpoint, log
    );
    all.retain(|section| !section.keys.is_empty());
    all
}

fn section(job: Job, name: &'static str, list: OptionList) -> Section {
    let key = |option: &OptionSpec| Key { name: format!("{name}.{}", option.path().join(".")), option: option.clone() };
    let keys = list.iter().map(key).filter(|key| job.knows(&key.name)).collect();
    Section { name, help: list.help().to_string(), keys }
}

impl Key {
    /// Returns true for the table of a method's own options.
    pub fn is_options(&self) -> bool {
        self.name.ends_with(".options")
    }
}
