//! Methods that sections name, and their options.

use lowrank_models::adapter::{RULES, STRUCTURES, StructureEntry};
use lowrank_models::linear::{PARAMETERIZATIONS, ParameterizationEntry};
use lowrank_optim::registry::{Kind, METHODS, OptionList, nearest};

/// A section with a `name` and `options`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// The section, such as `model.parameterization`.
    pub section: &'static str,
    /// Kind of the methods.
    pub kind: Kind,
}

/// All sections with a name and options.
pub const SLOTS: [Slot; 4] = [
    Slot { section: "model.parameterization", kind: Kind::Parameterization },
    Slot { section: "adapter", kind: Kind::Structure },
    Slot { section: "rule", kind: Kind::Rule },
    Slot { section: "optimizer", kind: Kind::Optimizer },
];

impl Slot {
    /// Key of the name.
    pub fn name_key(self) -> String {
        format!("{}.name", self.section)
    }

    /// Names of the methods.
    pub fn names(self) -> Vec<&'static str> {
        match self.kind {
            Kind::Optimizer => METHODS.iter().map(|method| method.name).collect(),
            Kind::Parameterization => PARAMETERIZATIONS.iter().map(|entry| entry.spec().name).collect(),
            Kind::Structure => STRUCTURES.iter().map(|entry| entry.spec.name).collect(),
            Kind::Rule => RULES.iter().map(|rule| rule.entry.name).collect(),
            _ => Vec::new(),
        }
    }

    /// Options of the method of a name; none when there is no such method.
    pub fn options(self, name: &str) -> Option<OptionList> {
        match self.kind {
            Kind::Optimizer => METHODS.iter().find(|method| method.name == name).map(|method| method.options()),
            Kind::Parameterization => ParameterizationEntry::find(name).ok().map(|entry| entry.spec().options()),
            Kind::Structure => StructureEntry::find(name).ok().map(|structure| structure.entry.options()),
            Kind::Rule => RULES.iter().find(|entry| entry.name == name).map(|entry| entry.options()),
            _ => None,
        }
    }
}

/// Where an option of any method that was typed in a section of its own has to be written.
pub fn moved(key: &str) -> Option<String> {
    let (section, option) = key.split_once('.')?;
    let slots = SLOTS.iter().filter(|slot| slot.section.split('.').next() == Some(section));
    let known = |slot: &&Slot| {
        slot.names().into_iter().any(|name| slot.options(name).is_some_and(|list| list.get(option).is_some()))
    };
    if key == "model.parameterization" {
        return Some("model.parameterization.name".into());
    }
    slots.into_iter().find(known).map(|slot| format!("{}.options.{option}", slot.section))
}

/// The known key with the fewest edits, when that is few enough to be a slip.
pub fn nearest_key(key: &str, known: &[String]) -> Option<String> {
    nearest(key, known.iter().map(String::as_str)).map(str::to_string)
}

/// Whether a parameterization restarts, and the learning rate with it.
pub fn restarts(name: &str) -> bool {
    ParameterizationEntry::find(name).is_ok_and(|entry| entry.spec().period.is_some())
}
