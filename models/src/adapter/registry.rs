//! The list of adapter structures: one line each.

use burn::module::{LoraAdapter, Module};
use serde_json::{Map, Value};

use super::allora::Allora;
use super::block_lora::BlockLora;
use super::bone::Bone;
use super::config::AdapterOptions;
use super::dora::Dora;
use super::error::AdapterError;
use super::hydra::Hydra;
use super::loca::Loca;
use super::loldu::LoLdu;
use super::lora_xs::LoraXs;
use super::nola::Nola;
use super::randlora::RandLora;
use super::salt::Salt;
use super::site::{Place, Site};
use super::sorsa::Sorsa;
use super::spec::{Alpha, Rank, Spec};
use super::structure::{Method, Structure};
use super::svfit::SvFit;
use super::tera::Tera;
use super::tlora::TLora;
use super::vera::Vera;
use super::wara::Wara;

macro_rules! structures {
    ($($variant:ident($type:ty)),* $(,)?) => {
        /// Any of the structures.
        #[derive(Module, Debug)]
        #[allow(missing_docs, clippy::large_enum_variant)] // the variants are what the list below says
        pub enum AnyStructure {
            $($variant($type),)*
        }

        impl AnyStructure {
            /// What it does.
            pub fn get(&self) -> &dyn Structure {
                match self {
                    $(Self::$variant(structure) => structure,)*
                }
            }

            /// What is to be known of it.
            pub fn spec(&self) -> &'static Spec {
                match self {
                    $(Self::$variant(_) => &<$type as Method>::SPEC,)*
                }
            }
        }

        /// All adapter structures.
        pub static STRUCTURES: &[StructureEntry] = &[
            $(StructureEntry {
                spec: &<$type as Method>::SPEC,
                lr: <$type as Method>::LR,
                defaults: defaults::<$type>,
                size: size::<$type>,
                check: check::<$type>,
                doubt: <$type as Method>::doubt,
                build: |options, site| Ok(AnyStructure::$variant(build::<$type>(options, site)?)),
            },)*
        ];
    };
}

structures! {
    Lora(LoraAdapter),
    Allora(Allora),
    BlockLora(BlockLora),
    Bone(Bone),
    Hydra(Hydra),
    LoLdu(LoLdu),
    Salt(Salt),
    Sorsa(Sorsa),
    SvFit(SvFit),
    Dora(Dora),
    LoraXs(LoraXs),
    Vera(Vera),
    RandLora(RandLora),
    Nola(Nola),
    Tera(Tera),
    Wara(Wara),
    TLora(TLora),
    Loca(Loca),
}

/// A structure of the list.
#[derive(Clone, Copy, Debug)]
pub struct StructureEntry {
    /// What is to be known of it.
    pub spec: &'static Spec,
    /// Learning rate of AdamW when none is given.
    pub lr: f64,
    defaults: fn() -> AdapterOptions,
    size: fn(&AdapterOptions) -> Result<(Rank, Alpha), AdapterError>,
    check: fn(&AdapterOptions, &Place) -> Result<(), AdapterError>,
    doubt: fn(&Place) -> Option<String>,
    build: fn(&AdapterOptions, &mut Site<'_>) -> Result<AnyStructure, AdapterError>,
}

impl StructureEntry {
    /// The structure of a name.
    pub fn find(name: &str) -> Result<&'static Self, AdapterError> {
        STRUCTURES.iter().find(|entry| entry.spec.name == name).ok_or_else(|| AdapterError::Unknown {
            name: name.to_string(),
            known: STRUCTURES.iter().map(|entry| entry.spec.name).collect::<Vec<_>>().join(", "),
        })
    }

    /// Its options with their defaults.
    pub fn defaults(&self) -> AdapterOptions {
        (self.defaults)()
    }

    /// Rank and alpha when none are given.
    pub fn size(&self, options: &AdapterOptions) -> Result<(Rank, Alpha), AdapterError> {
        (self.size)(options)
    }

    /// Refuses options and places that have no meaning.
    pub fn check(&self, options: &AdapterOptions, place: &Place) -> Result<(), AdapterError> {
        (self.check)(options, place)
    }

    /// What is allowed at these places, but rarely meant; what holds for many of them is said once.
    pub fn warnings(&self, places: &[Place]) -> Vec<String> {
        let mut found = Vec::new();
        for doubt in places.iter().filter_map(self.doubt) {
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
}

fn defaults<M: Method>() -> AdapterOptions {
    match serde_json::to_value(M::Options::default()) {
        Ok(Value::Object(map)) => map,
        // A unit struct has no options.
        _ => Map::new(),
    }
}

fn parsed<M: Method>(given: &AdapterOptions) -> Result<M::Options, AdapterError> {
    let mut values = defaults::<M>();
    let refuse = |key: &str, value: String, reason: String| AdapterError::Setting { key: key.into(), value, reason };
    for (key, value) in given {
        if !values.contains_key(key) {
            let known: Vec<&String> = values.keys().collect();
            let known = if known.is_empty() { "none".into() } else { format!("{known:?}") };
            return Err(refuse(key, value.to_string(), format!("{} has no such option; it has {known}", M::SPEC.name)));
        }
        values.insert(key.clone(), value.clone());
        // One at a time, so that a refusal names its option.
        if let Err(error) = serde_json::from_value::<M::Options>(Value::Object(values.clone())) {
            return Err(refuse(key, value.to_string(), error.to_string()));
        }
    }
    let value = if values.is_empty() { Value::Null } else { Value::Object(values) };
    serde_json::from_value(value).map_err(|error| refuse("options", "{}".into(), error.to_string()))
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

fn build<M: Method>(options: &AdapterOptions, site: &mut Site<'_>) -> Result<M, AdapterError> {
    M::build(&parsed::<M>(options)?, site)
}
