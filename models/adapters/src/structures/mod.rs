//! The structures, one file each.

mod allora;
mod block_lora;
mod bone;
mod components;
mod convert;
mod dora;
mod gated;
mod hydra;
mod loca;
mod loldu;
mod lora;
mod lora_xs;
mod modes;
mod nested;
mod nola;
mod randlora;
mod salt;
mod sorsa;
mod svfit;
mod tera;
mod tlora;
mod triplet;
mod vera;
mod wara;

use burn::module::LoraAdapter;

use crate::ground::entry::StructureEntry;

pub use allora::{Allora, AlloraOptions};
pub use block_lora::{BlockLora, BlockLoraOptions};
pub use bone::{Bone, BoneBlock, BoneMode, BoneOptions};
pub use dora::{Dora, DoraOptions};
pub use gated::{Gated, GatedOptions};
pub use hydra::{Hydra, HydraOptions};
pub use loca::{Loca, LocaOptions};
pub use loldu::{LoLdu, LoLduOptions, PivotStart};
pub use lora_xs::{LoraXs, LoraXsOptions};
pub use nested::{Nested, NestedOptions, NestedUpdate, RANK_OF_PASS};
pub use nola::{Nola, NolaOptions, Variant};
pub use randlora::{Draws, RandLora, RandLoraOptions};
pub use salt::{Salt, SaltOptions, SaltRelu};
pub use sorsa::{Sorsa, SorsaOptions};
pub use svfit::{SvFit, SvFitOptions};
pub use tera::{Tera, TeraOptions};
pub use tlora::{Regulariser, Residual, TLora, TLoraOptions};
pub use triplet::{Triplet, TripletOptions};
pub use vera::{Vera, VeraOptions};
pub use wara::{Wara, WaraOptions, Wavelet};

/// All adapter structures of this crate.
pub static STRUCTURES: &[StructureEntry] = &[
    StructureEntry::of::<LoraAdapter>(),
    StructureEntry::of::<Allora>(),
    StructureEntry::of::<BlockLora>(),
    StructureEntry::of::<Bone>(),
    StructureEntry::of::<Hydra>(),
    StructureEntry::of::<LoLdu>(),
    StructureEntry::of::<Salt>(),
    StructureEntry::of::<Sorsa>(),
    StructureEntry::of::<SvFit>(),
    StructureEntry::of::<Dora>(),
    StructureEntry::of::<LoraXs>(),
    StructureEntry::of::<Vera>(),
    StructureEntry::of::<RandLora>(),
    StructureEntry::of::<Nola>(),
    StructureEntry::of::<Tera>(),
    StructureEntry::of::<Wara>(),
    StructureEntry::of::<TLora>(),
    StructureEntry::of::<Loca>(),
    StructureEntry::of::<Gated>(),
    StructureEntry::of::<Nested>(),
    StructureEntry::of::<Triplet>(),
];
