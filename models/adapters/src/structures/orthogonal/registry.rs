//! File of the basis vectors that are in use, so that adapters trained apart do not choose the same.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions};
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::basis::BasisKind;

/// Indices in use, by layer and concept.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Registry {
    basis_seed: Option<u64>,
    layers: BTreeMap<String, UsedIndices>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct UsedIndices {
    d_in: usize,
    basis: BasisKind,
    concepts: BTreeMap<String, Vec<usize>>,
}

/// A request for indices of one layer.
pub(super) struct Claim<'a> {
    pub layer: &'a str,
    pub concept: &'a str,
    pub d_in: usize,
    pub basis: BasisKind,
    pub basis_seed: u64,
    pub rank: usize,
    /// Indices of other concepts may be chosen when too few are left.
    pub allow_overlap: bool,
}

/// Returns the indices of a concept at a layer: those it has, or new ones that `draw` chooses among the free ones.
///
/// Programs that ask at the same time wait for each other (`FILE.lock`); the file is replaced as a whole.
pub(super) fn claim(
    path: &Path,
    claim: &Claim<'_>,
    draw: impl FnOnce(&[usize]) -> Vec<usize>,
) -> Result<Vec<usize>, String> {
    let shown = path.display();
    let failed = |error: std::io::Error| format!("registry = {shown}: {error}");
    let beside = |end: &str| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        path.with_file_name(format!("{name}.{end}"))
    };
    let lock = OpenOptions::new().create(true).truncate(false).write(true).open(beside("lock")).map_err(failed)?;
    lock.lock().map_err(failed)?;
    let mut registry = match std::fs::read_to_string(path) {
        Ok(text) => serde_json::from_str::<Registry>(&text)
            .map_err(|error| format!("registry = {shown}: is no registry of basis vectors ({error})"))?,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Registry::default(),
        Err(error) => return Err(failed(error)),
    };
    let known = *registry.basis_seed.get_or_insert(claim.basis_seed);
    if known != claim.basis_seed {
        return Err(format!(
            "basis_seed = {}: {shown} is of basis_seed {known}, which all parties share; set it to {known}",
            claim.basis_seed
        ));
    }
    let layer = registry.layers.entry(claim.layer.to_string()).or_insert_with(|| UsedIndices {
        d_in: claim.d_in,
        basis: claim.basis,
        concepts: BTreeMap::new(),
    });
    if (layer.d_in, layer.basis) != (claim.d_in, claim.basis) {
        return Err(format!(
            "registry = {shown}: {} has {} inputs and basis {:?} there, {} and {:?} here; use one registry for adapters of one model",
            claim.layer, layer.d_in, layer.basis, claim.d_in, claim.basis
        ));
    }
    if let Some(own) = layer.concepts.get(claim.concept) {
        return match own.len() == claim.rank {
            true => Ok(own.clone()),
            false => Err(format!(
                "concept = {}: has rank {} in {shown}, {} is asked for; give the concept another name",
                claim.concept,
                own.len(),
                claim.rank
            )),
        };
    }
    let used: BTreeSet<usize> = layer.concepts.values().flatten().copied().collect();
    let mut free: Vec<usize> = (0..claim.d_in).filter(|index| !used.contains(index)).collect();
    if free.len() < claim.rank {
        if !claim.allow_overlap {
            return Err(format!(
                "registry = {shown}: {} of {} vectors are left for {}, rank {} is asked for; lower the rank, or set allow_overlap = true",
                free.len(),
                claim.d_in,
                claim.layer,
                claim.rank
            ));
        }
        free = (0..claim.d_in).collect();
    }
    let drawn = draw(&free);
    layer.concepts.insert(claim.concept.to_string(), drawn.clone());
    let new = beside("new");
    let write = || -> std::io::Result<()> {
        let file = File::create(&new)?;
        serde_json::to_writer(&file, &registry)?;
        file.sync_all()?;
        std::fs::rename(&new, path)
    };
    write().map_err(failed)?;
    Ok(drawn)
}
