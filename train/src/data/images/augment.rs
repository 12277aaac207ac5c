//! Random changes of training images.

use lowrank_kernels::random::{generator, key_of};
use rand::RngExt;

use super::picture::Picture;
use super::resample::{Filter, resized};

/// Random changes; the defaults change nothing.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Augment {
    /// Mirror half of the images from left to right.
    pub flip: bool,
    /// Smallest part of each side that a random crop keeps, 1 for no crop.
    pub crop: f64,
    /// Largest angle of a random rotation in degrees, in both directions.
    pub rotate: f64,
}

impl Default for Augment {
    fn default() -> Self {
        Self { flip: false, crop: 1.0, rotate: 0.0 }
    }
}

impl Augment {
    /// Changes an image. The draws depend on the seed and on the position in the run alone, so that a resumed run sees the same images.
    pub fn apply(&self, picture: Picture, seed: u64, position: u64) -> Picture {
        let mut random = generator(seed, key_of("augment"), position);
        let mut picture = picture;
        if self.rotate > 0.0 {
            picture = picture.rotated((2.0 * random.random::<f64>() - 1.0) * self.rotate);
        }
        if self.crop < 1.0 {
            let kept = self.crop + (1.0 - self.crop) * random.random::<f64>();
            let size = |side: usize| ((side as f64 * kept).round() as usize).clamp(1, side);
            let (width, height) = (size(picture.width), size(picture.height));
            let mut start = |outer: usize, inner: usize| random.random_range(0..=outer - inner);
            let (left, top) = (start(picture.width, width), start(picture.height, height));
            picture = resized(&picture.part(left, top, width, height), picture.width, picture.height, Filter::Bilinear);
        }
        if self.flip && random.random::<bool>() { picture.flipped() } else { picture }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_follow_from_seed_and_position() {
        let picture = Picture::grey(8, 6, &(0..48).collect::<Vec<u8>>());
        assert_eq!(Augment::default().apply(picture.clone(), 1, 2), picture);
        let all = Augment { flip: true, crop: 0.5, rotate: 20.0 };
        let at = |seed, position| all.apply(picture.clone(), seed, position);
        assert_eq!(at(1, 2), at(1, 2));
        assert!(at(1, 2) != at(1, 3) && at(1, 2) != at(2, 2));
        assert_eq!((at(1, 5).width, at(1, 5).height), (8, 6));
        let flips = (0..100).filter(|position| {
            Augment { flip: true, ..Augment::default() }.apply(picture.clone(), 1, *position) != picture
        });
        assert!((30..70).contains(&flips.count()));
    }
}
