//! Projected optimizers: projector, inner optimizer, residual rule and moment storage, each chosen independently.

mod build;
mod carry;
mod compatibility;
pub mod config;
mod fused;
mod idle;
mod inner;
pub mod named;
mod parts;
pub mod projector;
mod residual;
pub mod state;
pub mod step;
pub mod subspace;
#[cfg(test)]
mod tests;
