//! Values in f16.

/// The f32 of the same value as the f16 with these bits: without branches, so that loops of it become vectors.
#[inline(always)]
pub fn widened(value: u16) -> f32 {
    let magnitude = u32::from(value & 0x7fff);
    let normal = (magnitude << 13) + (112 << 23);
    // Denormal numbers are whole multiples of 2^-24.
    let tiny = (magnitude as f32 * f32::from_bits((127 - 24) << 23)).to_bits();
    // Infinity, and NaN with the bit that makes it quiet.
    let special = 0x7f80_0000 | magnitude << 13 | u32::from(magnitude > 0x7c00) << 22;
    let bits = if magnitude < 0x400 { tiny } else { normal };
    let bits = if magnitude < 0x7c00 { bits } else { special };
    f32::from_bits(bits | u32::from(value & 0x8000) << 16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::f16;

    #[test]
    fn every_value_is_that_of_the_library() {
        for bits in 0..=u16::MAX {
            assert_eq!(widened(bits).to_bits(), f16::from_bits(bits).to_f32().to_bits(), "{bits:#x}");
        }
    }
}
