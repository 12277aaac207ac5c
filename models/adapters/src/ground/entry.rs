//! A structure as its description and functions, independent of its type.

use lowrank_optim::registry::{Entry, Kind, OptionList, Paper, Registered};

use super::any::AnyStructure;
use super::config::AdapterOptions;
use super::error::AdapterError;
use super::site::{Place, Site};
use super::spec::{Alpha, Rank, Spec};
use super::structure::Method;

/// Structure as an entry of a list.
#[derive(Clone, Copy, Debug)]
pub struct StructureEntry {
    /// Description common to methods of every kind.
    pub entry: Entry,
    /// Static description beyond the entry: rank, alpha, initialisations, tensors.
    pub spec: &'static Spec,
    /// Default learning rate of AdamW.
    pub lr: f64,
    size: fn(&AdapterOptions) -> Result<(Rank, Alpha), AdapterError>,
    check: fn(&AdapterOptions, &Place) -> Result<(), AdapterError>,
    kept: fn(&AdapterOptions, &Place) -> Result<usize, AdapterError>,
    warning: fn(&Place) -> Option<String>,
    build: fn(&AdapterOptions, &mut Site<'_>) -> Result<AnyStructure, AdapterError>,
    resize: fn(&AnyStructure, &[usize], &mut Site<'_>) -> Result<AnyStructure, AdapterError>,
}

impl StructureEntry {
    /// Entry of a structure.
    pub const fn of<M: Method + 'static>() -> Self {
        Self {
            entry: Entry {
                papers: const { &[Paper { title: M::SPEC.title, place: M::SPEC.arxiv }] },
                memory: M::SPEC.trains,
                lr: Some(M::LR),
                options: options::<M>,
                ..Entry::plain(Kind::Structure, M::SPEC.name, M::SPEC.summary)
            },
            spec: const { &M::SPEC },
            lr: M::LR,
            size: size::<M>,
            check: check::<M>,
            kept: |options, place| Ok(M::kept(&parsed::<M>(options)?, place)),
            warning: M::warning,
            build: build::<M>,
            resize: resize::<M>,
        }
    }

    /// Default rank and alpha.
    pub fn size(&self, options: &AdapterOptions) -> Result<(Rank, Alpha), AdapterError> {
        (self.size)(options)
    }

    /// Rejects unsupported options and layers.
    pub fn check(&self, options: &AdapterOptions, place: &Place) -> Result<(), AdapterError> {
        (self.check)(options, place)
    }

    /// Elements that a forward pass at a layer keeps for the backward pass, besides the inner width of each token.
    pub fn kept(&self, options: &AdapterOptions, place: &Place) -> Result<usize, AdapterError> {
        (self.kept)(options, place)
    }

    /// Warnings about settings that are allowed for these layers but rarely intended, without duplicates.
    pub fn warnings(&self, places: &[Place]) -> Vec<String> {
        let mut found = Vec::new();
        for doubt in places.iter().filter_map(self.warning) {
            if !found.contains(&doubt) {
                found.push(doubt);
            }
        }
        found
    }

    /// Builds the adapter of one layer.
    pub fn build(&self, options: &AdapterOptions, site: &mut Site<'_>) -> Result<AnyStructure, AdapterError> {
        (self.build)(options, site)
    }

    /// Builds the adapter of one layer with the components of `keep` and new ones up to the rank of the site.
    pub fn resize(
        &self,
        structure: &AnyStructure,
        keep: &[usize],
        site: &mut Site<'_>,
    ) -> Result<AnyStructure, AdapterError> {
        (self.resize)(structure, keep, site)
    }
}

impl Registered for StructureEntry {
    fn entry(&self) -> &Entry {
        &self.entry
    }
}

fn options<M: Method>() -> OptionList {
    OptionList::of(&M::Options::default())
}

fn parsed<M: Method>(given: &AdapterOptions) -> Result<M::Options, AdapterError> {
    Ok(options::<M>().configure(M::SPEC.name, given).map_err(|error| error.under("adapter.options"))?)
}

fn size<M: Method>(options: &AdapterOptions) -> Result<(Rank, Alpha), AdapterError> {
    Ok(M::size(&parsed::<M>(options)?))
}

fn check<M: Method>(options: &AdapterOptions, place: &Place) -> Result<(), AdapterError> {
    let options = parsed::<M>(options)?;
    M::check(&options, place).map_err(|reason| AdapterError::Place {
        path: place.path.clone(),
        d_in: place.shape[0],
        d_out: place.shape[1],
        reason,
    })
}

fn build<M: Method + 'static>(options: &AdapterOptions, site: &mut Site<'_>) -> Result<AnyStructure, AdapterError> {
    Ok(AnyStructure::new(M::build(&parsed::<M>(options)?, site)?))
}

fn resize<M: Method + 'static>(
    structure: &AnyStructure,
    keep: &[usize],
    site: &mut Site<'_>,
) -> Result<AnyStructure, AdapterError> {
    match structure.downcast_ref::<M>() {
        Some(structure) => Ok(AnyStructure::new(structure.resized(keep, site)?)),
        None => {
            Err(AdapterError::Refused(format!("{} is another structure than {}", structure.spec().name, M::SPEC.name)))
        }
    }
}
