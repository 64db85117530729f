"""The page of `attnctl ui`: pictures plain and controlled, word maps, heads, videos. It needs gradio.

`knobs`, `models`, `actions` and `video_actions` say what the page does and know nothing of gradio; `page` and one file
for each tab say how it looks; `serve` starts it.
"""
