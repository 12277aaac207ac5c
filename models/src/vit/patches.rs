//! Images as sequences of patches.

use burn::module::{Module, Param};
use burn::tensor::Tensor;

use super::config::ImageShape;
use crate::error::ModelError;
use crate::ops;
use crate::weights::{Builder, Init};

/// Linear map of the patches of an image, stored as the convolution that it equals.
#[derive(Module, Debug)]
pub struct PatchProjection {
    /// Kernel `[hidden_size, num_channels, patch_size, patch_size]`.
    pub weight: Param<Tensor<4>>,
    /// Bias `[hidden_size]`; CLIP has none.
    pub bias: Option<Param<Tensor<1>>>,
}

impl PatchProjection {
    pub(super) fn build(
        builder: &mut Builder,
        path: &str,
        image: &ImageShape,
        hidden: usize,
        bias: bool,
    ) -> Result<Self, ModelError> {
        let kernel = [hidden, image.num_channels, image.patch_size, image.patch_size];
        Ok(Self {
            weight: builder.tensor(&format!("{path}.weight"), kernel, Init::Standard)?,
            bias: match bias {
                true => Some(builder.vector(&format!("{path}.bias"), hidden, Init::Constant(0.0))?),
                false => None,
            },
        })
    }

    /// Pixels `[batch, num_channels, image_size, image_size]` to `[batch, patches, hidden_size]`, row after row of the image. Pixels beyond the
    /// last whole patch do not count.
    pub fn forward(&self, pixels: Tensor<4>) -> Tensor<3> {
        let kernel = self.weight.val();
        let ([batch, _, height, width], [hidden, channels, side, _]) = (pixels.dims(), kernel.dims());
        let (down, across) = (height / side, width / side);
        let whole = match (down * side, across * side) == (height, width) {
            true => pixels,
            false => pixels.slice([0..batch, 0..channels, 0..down * side, 0..across * side]),
        };
        let parts: Tensor<6> = whole.reshape([batch, channels, down, side, across, side]).permute([0, 2, 4, 1, 3, 5]);
        let values = channels * side * side;
        let rows = parts.reshape([batch * down * across, values]);
        let out = ops::linear(rows, kernel.reshape([hidden, values]).transpose());
        let out = match &self.bias {
            Some(bias) => out + bias.val().unsqueeze(),
            None => out,
        };
        out.reshape([batch, down * across, hidden])
    }
}

/// Class token `[1, 1, hidden_size]`, patches `[batch, patches, hidden_size]` and learned positions `[1, patches + 1, hidden_size]` to the input
/// of the encoder.
pub(super) fn with_class_token(token: Tensor<3>, patches: Tensor<3>, positions: Tensor<3>) -> Tensor<3> {
    let [batch, _, hidden] = patches.dims();
    Tensor::cat(vec![token.expand([batch, 1, hidden]), patches], 1) + positions
}
