//! Published optimizers, one file per method.

pub mod adamw;
pub mod adamw_8bit;
pub mod apollo;
pub mod dct_adamw;
pub mod dion;
pub mod fira;
pub mod frugal;
pub mod galore;
pub mod ldadam;
pub mod loro;
pub mod muon;
pub mod orthogonal;
pub mod scale;
pub mod trion;
