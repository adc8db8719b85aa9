// Lets the site's search work in pages that are opened from a disk, where browsers start no Worker:
// its script runs in a hidden frame instead. Material's search asks for a class of this name.
if (location.protocol === "file:") {
  window.IFrameWorker = class IFrameWorker extends EventTarget {
    constructor(url) {
      super();
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      this.ready = new Promise((resolve) => (this.frame.onload = resolve));
      const script = document.createElement("script");
      script.src = new URL(url, location).href;
      this.frame.srcdoc = "<script>postMessage = (data) => parent.postMessage(data, '*')</script>"
        + script.outerHTML;
      addEventListener("message", ({ source, data }) => {
        if (source === this.frame.contentWindow)
          this.dispatchEvent(new MessageEvent("message", { data }));
      });
      document.body.append(this.frame);
    }
    postMessage(data) {
      this.ready.then(() =>
        this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data })));
    }
  };
  window.Worker = window.IFrameWorker;
}
