//! The structures, one file each.

mod allora;
mod bayesian_lora;
mod block_lora;
mod bone;
mod components;
mod convert;
mod diffora;
mod dora;
mod fourierft;
mod gated;
mod hira;
mod hydra;
mod ia3;
mod loca;
mod loha;
mod lokr;
mod loldu;
mod lora;
mod lora_xs;
mod modes;
mod nested;
mod nola;
mod oft;
mod orthogonal;
mod pego;
mod randlora;
mod salt;
mod shira;
mod snell;
mod sorsa;
mod svfit;
mod tera;
mod tlora;
mod torch;
mod triplet;
mod vera;
mod wara;

use burn::module::LoraAdapter;

use crate::ground::entry::StructureEntry;

pub use allora::{Allora, AlloraOptions};
pub use bayesian_lora::{
    BayesianLora, BayesianLoraOptions, GateDraws, GatedParts, Gates, HardConcrete, LEAST_RANGE, LevelWeights,
    level_penalty,
};
pub use block_lora::{BlockLora, BlockLoraOptions};
pub use bone::{Bone, BoneBlock, BoneMode, BoneOptions};
pub use diffora::Diffora;
pub use dora::{Dora, DoraOptions};
pub use fourierft::{FourierFt, FourierFtOptions};
pub use gated::{Gated, GatedOptions};
pub use hira::Hira;
pub use hydra::{Hydra, HydraOptions};
pub use ia3::{Ia3, Ia3Options};
pub use loca::{Loca, LocaOptions};
pub use loha::LoHa;
pub use lokr::{LoKr, LoKrOptions};
pub use loldu::{LoLdu, LoLduOptions, PivotStart};
pub use lora_xs::{LoraXs, LoraXsOptions};
pub use nested::{Nested, NestedOptions, NestedUpdate, RANK_OF_PASS};
pub use nola::{Nola, NolaOptions, Variant};
pub use oft::{Oft, OftOptions};
pub use orthogonal::{Basis, BasisKind, Orthogonal, OrthogonalOptions};
pub use pego::{Pego, PegoOptions, Reduction};
pub use randlora::{Draws, RandLora, RandLoraOptions};
pub use salt::{Salt, SaltOptions, SaltRelu};
pub use shira::{Shira, ShiraOptions};
pub use snell::{Snell, SnellMode, SnellOptions};
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
    StructureEntry::of::<Orthogonal>(),
    StructureEntry::of::<LoHa>(),
    StructureEntry::of::<LoKr>(),
    StructureEntry::of::<Oft>(),
    StructureEntry::of::<Ia3>(),
    StructureEntry::of::<Hira>(),
    StructureEntry::of::<Shira>(),
    StructureEntry::of::<FourierFt>(),
    StructureEntry::of::<Gated>(),
    StructureEntry::of::<Nested>(),
    StructureEntry::of::<Triplet>(),
    StructureEntry::of::<Diffora>(),
    StructureEntry::of::<BayesianLora>(),
    StructureEntry::of::<Snell>(),
    StructureEntry::of::<Pego>(),
];
