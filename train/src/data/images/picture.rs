//! Pictures in memory.

/// Pixels of three colours with 8 bits each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Picture {
    /// Columns.
    pub width: usize,
    /// Rows.
    pub height: usize,
    /// Red, green and blue of each pixel, row after row.
    pub pixels: Vec<u8>,
}

impl Picture {
    /// A picture with the same value for all three colours of a pixel.
    pub fn grey(width: usize, height: usize, values: &[u8]) -> Self {
        Self { width, height, pixels: values.iter().flat_map(|value| [*value; 3]).collect() }
    }

    /// Content of a PNG file.
    pub fn png(&self) -> Result<Vec<u8>, image::ImageError> {
        let mut bytes = Vec::new();
        let encoder = image::codecs::png::PngEncoder::new(&mut bytes);
        encoder.encode(&self.pixels, self.width as u32, self.height as u32, image::ColorType::Rgb8)?;
        Ok(bytes)
    }

    /// The pixel at a column and row.
    pub fn at(&self, x: usize, y: usize) -> [u8; 3] {
        let start = 3 * (y * self.width + x);
        [self.pixels[start], self.pixels[start + 1], self.pixels[start + 2]]
    }

    /// A picture of this size whose pixels are those of `from`, black where that is outside.
    fn drawn(&self, width: usize, height: usize, from: impl Fn(usize, usize) -> Option<(usize, usize)>) -> Self {
        let mut pixels = Vec::with_capacity(3 * width * height);
        for y in 0..height {
            for x in 0..width {
                pixels.extend(from(x, y).map_or([0; 3], |(x, y)| self.at(x, y)));
            }
        }
        Self { width, height, pixels }
    }

    /// The part of this size in the middle; black is added on both sides of a picture that is smaller.
    pub fn centre(&self, width: usize, height: usize) -> Self {
        // Rounded as transformers does it: down where pixels are taken off, and for padding so that the odd one comes last.
        let before = |outer: usize, inner: usize| (outer as isize - inner as isize).div_euclid(2);
        let (left, top) = (before(self.width, width), before(self.height, height));
        self.drawn(width, height, |x, y| {
            let place = |at: usize, first: isize, size: usize| {
                usize::try_from(at as isize + first).ok().filter(|at| *at < size)
            };
            Some((place(x, left, self.width)?, place(y, top, self.height)?))
        })
    }

    /// The part that starts at a column and row.
    pub fn part(&self, left: usize, top: usize, width: usize, height: usize) -> Self {
        self.drawn(width, height, |x, y| Some((left + x, top + y)))
    }

    /// Mirrored from left to right.
    pub fn flipped(&self) -> Self {
        self.drawn(self.width, self.height, |x, y| Some((self.width - 1 - x, y)))
    }

    /// Turned as an EXIF orientation from 1 to 8 says.
    pub(super) fn oriented(self, orientation: u8) -> Self {
        let (width, height) = (self.width, self.height);
        let (right, bottom) = (width - 1, height - 1);
        match orientation {
            2 => self.flipped(),
            3 => self.drawn(width, height, |x, y| Some((right - x, bottom - y))),
            4 => self.drawn(width, height, |x, y| Some((x, bottom - y))),
            5 => self.drawn(height, width, |x, y| Some((y, x))),
            6 => self.drawn(height, width, |x, y| Some((y, bottom - x))),
            7 => self.drawn(height, width, |x, y| Some((right - y, bottom - x))),
            8 => self.drawn(height, width, |x, y| Some((right - y, x))),
            _ => self,
        }
    }

    /// Rotated around its middle, anticlockwise by an angle in degrees, in the same frame: each pixel is the nearest one, black outside.
    pub fn rotated(&self, degrees: f64) -> Self {
        let (sin, cos) = degrees.to_radians().sin_cos();
        let (middle_x, middle_y) = (self.width as f64 / 2.0, self.height as f64 / 2.0);
        self.drawn(self.width, self.height, |x, y| {
            let (dx, dy) = (x as f64 + 0.5 - middle_x, y as f64 + 0.5 - middle_y);
            let place = |at: f64, size: usize| {
                let at = at.floor();
                (at >= 0.0 && at < size as f64).then_some(at as usize)
            };
            let from_x = place(cos * dx - sin * dy + middle_x, self.width)?;
            Some((from_x, place(sin * dx + cos * dy + middle_y, self.height)?))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbered(width: usize, height: usize) -> Picture {
        Picture::grey(width, height, &(0..(width * height) as u8).collect::<Vec<u8>>())
    }

    fn values(picture: &Picture) -> Vec<u8> {
        picture.pixels.iter().step_by(3).copied().collect()
    }

    #[test]
    fn centres_are_cut_and_padded_as_transformers_does() {
        assert_eq!(values(&numbered(4, 3).centre(2, 2)), [1, 2, 5, 6]);
        assert_eq!(values(&numbered(2, 1).centre(3, 2)), [0, 0, 0, 0, 0, 1]);
        assert_eq!(values(&numbered(1, 1).centre(4, 4)).iter().filter(|value| **value == 0).count(), 16);
        let one = Picture::grey(1, 1, &[9]);
        assert_eq!(values(&one.centre(4, 1)), [0, 0, 9, 0]);
        assert_eq!(values(&one.centre(3, 1)), [0, 9, 0]);
    }

    #[test]
    fn flips_and_rotations_move_pixels() {
        assert_eq!(values(&numbered(3, 1).flipped()), [2, 1, 0]);
        let square = numbered(3, 3);
        assert_eq!(values(&square.rotated(90.0)), [2, 5, 8, 1, 4, 7, 0, 3, 6]);
        assert_eq!(square.rotated(360.0), square);
        assert_eq!(square.rotated(180.0).rotated(180.0), square);
        // As Pillow's `ImageOps.exif_transpose` turns [[0, 1, 2], [3, 4, 5]].
        for (orientation, turned) in [
            (1, [0, 1, 2, 3, 4, 5]),
            (2, [2, 1, 0, 5, 4, 3]),
            (3, [5, 4, 3, 2, 1, 0]),
            (4, [3, 4, 5, 0, 1, 2]),
            (5, [0, 3, 1, 4, 2, 5]),
            (6, [3, 0, 4, 1, 5, 2]),
            (7, [5, 2, 4, 1, 3, 0]),
            (8, [2, 5, 1, 4, 0, 3]),
        ] {
            assert_eq!(values(&numbered(3, 2).oriented(orientation)), turned, "{orientation}");
        }
    }
}
