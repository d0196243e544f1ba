import torch
from torchvision import ops

from sgtr_hf.boxes import (
    box_cxcywh_to_xyxy,
    box_iou,
    box_xyxy_to_cxcywh,
    generalized_box_iou,
    scale_boxes,
)


def random_corners(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator)
    return torch.cat((corner, corner + torch.rand(count, 2, generator=generator)), dim=1)


def test_formats_are_inverse():
    corners = random_corners(20)
    torch.testing.assert_close(box_cxcywh_to_xyxy(box_xyxy_to_cxcywh(corners)), corners)


def test_overlaps_equal_torchvision():
    first, second = random_corners(8), random_corners(5, seed=1)
    pairs = (first[:, None], second[None])
    torch.testing.assert_close(box_iou(*pairs), ops.box_iou(first, second))
    torch.testing.assert_close(
        generalized_box_iou(*pairs), ops.generalized_box_iou(first, second), rtol=1e-5, atol=1e-6
    )


def test_empty_boxes_give_numbers_and_gradients():
    boxes = torch.zeros(1, 4, requires_grad=True)
    overlap = generalized_box_iou(boxes, torch.zeros(1, 4))
    overlap.sum().backward()
    assert torch.isfinite(overlap).all()
    assert torch.isfinite(boxes.grad).all()


def test_scaling_knows_height_from_width():
    boxes = torch.tensor([[[0.5, 0.5, 1.0, 1.0]]])
    scaled = scale_boxes(boxes, torch.tensor([[10, 40]]))
    assert scaled.tolist() == [[[20.0, 5.0, 40.0, 10.0]]]
