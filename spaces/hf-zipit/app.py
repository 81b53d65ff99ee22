"""The Space: the page of `hf-zipit app`, for models and data sets of the Hub."""

from hf_zipit.app import build

demo = build(only_hub=True)

if __name__ == "__main__":
    demo.launch()
