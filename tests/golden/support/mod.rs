//! Helpers that the runners of several methods share.

pub mod allocated;
pub mod bases;
pub mod bench;
pub mod case;
pub mod combine;
pub mod compose;
pub mod decompositions;
pub mod factors;
pub mod matrices;
pub mod momentum;
pub mod projected;
pub mod rules;
pub mod structures;
pub mod trainer;
