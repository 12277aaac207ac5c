//! From image files to the pixels of a model.
//!
//! ```text
//! DIR/class/*.png, JSON lines, IDX -> pictures -> size that the model sees -> random changes -> pixels
//! ```
//!
//! [`ImageSettings`] reads a model's `preprocessor_config.json`; pixels are those of `transformers` with Pillow.

mod augment;
mod decode;
mod error;
mod exif;
mod idx;
mod picture;
mod resample;
mod set;
mod settings;
mod source;

pub use augment::Augment;
pub use error::ImageError;
pub use picture::Picture;
pub use resample::{Filter, resized};
pub use set::{ImageSet, LabelledImage};
pub use settings::{ImageSettings, PREPROCESSOR, Size};
