//! Lookup of structures by name: those of this crate and registered ones.

use std::sync::{PoisonError, RwLock};

use lowrank_optim::registry::{Kind, find};

use crate::ground::entry::StructureEntry;
use crate::ground::error::AdapterError;
use crate::ground::initialisation::Initialisation;
use crate::structures::STRUCTURES;

/// Registered structures of other crates.
static REGISTERED: RwLock<Vec<&'static StructureEntry>> = RwLock::new(Vec::new());

/// Registers a structure of another crate, so that configurations and adapter files can use it.
///
/// ```
/// # use lowrank_adapters::{AdapterError, StructureEntry, register};
/// # use burn::module::LoraAdapter as Mine;
/// static MINE: StructureEntry = StructureEntry::of::<Mine>();
/// # fn example() -> Result<(), AdapterError> {
/// register(&MINE)
/// # }
/// ```
pub fn register(entry: &'static StructureEntry) -> Result<(), AdapterError> {
    let mut registered = REGISTERED.write().unwrap_or_else(PoisonError::into_inner);
    let name = entry.spec.name;
    match STRUCTURES.iter().chain(registered.iter().copied()).find(|known| known.spec.name == name) {
        None => registered.push(entry),
        // The same structure registered again.
        Some(known) if std::ptr::eq(known, entry) => {}
        Some(known) => {
            return Err(AdapterError::Refused(format!(
                "the name {name} is taken by the structure of \"{}\"; give the new one another",
                known.spec.title
            )));
        }
    }
    Ok(())
}

impl StructureEntry {
    /// Returns the structure with this name, of this crate or registered.
    pub fn find(name: &str) -> Result<&'static Self, AdapterError> {
        let registered = REGISTERED.read().unwrap_or_else(PoisonError::into_inner);
        let all: Vec<&'static Self> = STRUCTURES.iter().chain(registered.iter().copied()).collect();
        Ok(find(Kind::Structure, all.iter().copied(), name)?)
    }
}

/// Returns the initialisations of all structures of this crate, each once.
pub fn initialisations() -> Vec<&'static Initialisation> {
    let mut all: Vec<&'static Initialisation> = Vec::new();
    for init in STRUCTURES.iter().flat_map(|structure| structure.spec.inits) {
        if all.iter().all(|known| known.name != init.name) {
            all.push(init);
        }
    }
    all
}
