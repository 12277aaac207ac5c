//! Methods that sections name, and their options.

use lowrank_models::adapter::{ALLOCATIONS, AllocationEntry, PENALTIES, RULES, STRUCTURES, StructureEntry};
use lowrank_models::linear::{PARAMETERIZATIONS, ParameterizationEntry};
use lowrank_optim::registry::{Entry, Kind, METHODS, OptionList, Registered, nearest};

/// Section with a `name` and `options`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Name of the section, such as `model.parameterization`.
    pub section: &'static str,
    /// Kind of the methods.
    pub kind: Kind,
}

/// All sections with a name and options.
pub const SLOTS: [Slot; 6] = [
    Slot { section: "optimizer", kind: Kind::Optimizer },
    Slot { section: "model.parameterization", kind: Kind::Parameterization },
    Slot { section: "adapter", kind: Kind::Structure },
    Slot { section: "rule", kind: Kind::Rule },
    Slot { section: "allocation", kind: Kind::Allocation },
    Slot { section: "penalty", kind: Kind::Penalty },
];

impl Slot {
    /// Key of the name.
    pub fn name_key(self) -> String {
        format!("{}.name", self.section)
    }

    /// All methods of this program, in the order of their list.
    pub fn methods(self) -> Vec<Entry> {
        match self.kind {
            Kind::Optimizer => METHODS.iter().map(|method| method.entry).collect(),
            Kind::Parameterization => PARAMETERIZATIONS.iter().map(|method| *method.entry()).collect(),
            Kind::Structure => STRUCTURES.iter().map(|structure| structure.entry).collect(),
            Kind::Rule => RULES.iter().map(|rule| rule.entry).collect(),
            Kind::Allocation => ALLOCATIONS.iter().map(|allocation| allocation.entry).collect(),
            Kind::Penalty => PENALTIES.iter().map(|penalty| penalty.entry).collect(),
            _ => Vec::new(),
        }
    }

    /// Names of the methods.
    pub fn names(self) -> Vec<&'static str> {
        self.methods().into_iter().map(|method| method.name).collect()
    }

    /// Options of the method with this name; none if there is no such method.
    pub fn options(self, name: &str) -> Option<OptionList> {
        if self.kind == Kind::Structure {
            // Structures of other crates are registered at run time.
            return StructureEntry::find(name).ok().map(|structure| structure.entry.options());
        }
        self.methods().iter().find(|method| method.name == name).map(Entry::options)
    }
}

/// Correct key of an option that was given in a section named after its method.
pub fn moved(key: &str) -> Option<String> {
    if key == "model.parameterization" {
        return Some("model.parameterization.name".into());
    }
    let (section, option) = key.split_once('.')?;
    let mut slots = SLOTS.iter().filter(|slot| slot.section.split('.').next() == Some(section));
    let slot = slots.find(|slot| slot.methods().iter().any(|method| method.options().get(option).is_some()))?;
    Some(format!("{}.options.{option}", slot.section))
}

/// Known key with the fewest edits, if there are few enough for a typing error.
pub fn nearest_key(key: &str, known: &[String]) -> Option<String> {
    nearest(key, known.iter().map(String::as_str)).map(str::to_string)
}

/// Structure that an allocation works on where none is given.
pub fn structure_of(allocation: &str) -> Option<&'static str> {
    AllocationEntry::find(allocation).ok()?.structures.first().copied()
}

/// Name that stands for no allocation and no penalty.
pub const NONE: &str = "none";

/// Returns true if a parameterization restarts, and the learning rate with it.
pub fn restarts(name: &str) -> bool {
    ParameterizationEntry::find(name).is_ok_and(|entry| entry.spec().period.is_some())
}
