//! State kept between steps: stored moments, quantised values, error feedback, resets, measured bytes.

pub mod error_feedback;
pub mod meter;
pub mod moments;
pub mod quantised;
pub mod rate;
pub mod reset;
pub mod store;
